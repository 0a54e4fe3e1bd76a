// How GPUs reach each other, from the runtime and, if it is there, NVML.

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <string>

#include "arena.h"
#include "driver.h"
#include "nvml.h"

namespace {

// NVML's library comes with the driver and may be missing.
using aqua::cuda::kMostLinks;
using aqua::cuda::kNvmlSuccess;
using aqua::cuda::kP2pNvlink;
using aqua::cuda::kP2pOk;
using aqua::cuda::kRemoteGpu;
using Device = aqua::cuda::NvmlDevice;
using Pci = aqua::cuda::NvmlPci;

struct Nvml {
  int (*init)() = nullptr;
  int (*by_bus)(const char*, Device*) = nullptr;
  int (*p2p_status)(Device, Device, int, int*) = nullptr;
  int (*link_state)(Device, unsigned, int*) = nullptr;
  int (*link_version)(Device, unsigned, unsigned*) = nullptr;
  int (*remote_type)(Device, unsigned, int*) = nullptr;   // from here on they may be missing
  int (*remote_pci)(Device, unsigned, Pci*) = nullptr;
  int (*pci)(Device, Pci*) = nullptr;
  int (*pcie_generation)(Device, unsigned*) = nullptr;
  int (*pcie_width)(Device, unsigned*) = nullptr;
  bool usable = false;
};

template <typename Function>
bool find(void* library, const char* name, Function* out) {
  *out = reinterpret_cast<Function>(dlsym(library, name));
  return *out != nullptr;
}

const Nvml& nvml() {
  static const Nvml found = [] {
    Nvml n;
    void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return n;
    n.usable = find(library, "nvmlInit_v2", &n.init) &&
               find(library, "nvmlDeviceGetHandleByPciBusId_v2", &n.by_bus) &&
               find(library, "nvmlDeviceGetP2PStatus", &n.p2p_status) &&
               find(library, "nvmlDeviceGetNvLinkState", &n.link_state) &&
               find(library, "nvmlDeviceGetNvLinkVersion", &n.link_version) &&
               find(library, "nvmlDeviceGetMaxPcieLinkGeneration", &n.pcie_generation) &&
               find(library, "nvmlDeviceGetMaxPcieLinkWidth", &n.pcie_width) &&
               n.init() == kNvmlSuccess;
    find(library, "nvmlDeviceGetNvLinkRemoteDeviceType", &n.remote_type);
    find(library, "nvmlDeviceGetNvLinkRemotePciInfo_v2", &n.remote_pci);
    find(library, "nvmlDeviceGetPciInfo_v3", &n.pci);
    return n;
  }();
  return found;
}

bool device_of(int32_t ordinal, Device* out) {
  char bus[32];
  return cudaDeviceGetPCIBusId(bus, sizeof(bus), ordinal) == cudaSuccess &&
         nvml().by_bus(bus, out) == kNvmlSuccess;
}

// Whether a link of `ours` may carry what goes to `theirs`: it ends there, or at a switch.
bool leads_to(Device ours, unsigned link, Device theirs) {
  int type = -1;
  Pci end{}, peer{};
  if (nvml().remote_type == nullptr || nvml().remote_type(ours, link, &type) != kNvmlSuccess ||
      type != kRemoteGpu || nvml().remote_pci == nullptr || nvml().pci == nullptr ||
      nvml().remote_pci(ours, link, &end) != kNvmlSuccess || nvml().pci(theirs, &peer) != kNvmlSuccess) {
    return true;  // a switch, or it isn't known
  }
  return end.domain == peer.domain && end.bus == peer.bus && end.device == peer.device;
}

// The same of a PCIe lane.
int64_t lane_speed(unsigned generation) {
  int64_t speed = 250;
  for (unsigned i = 1; i < generation; ++i) speed *= 2;
  return speed;
}

}  // namespace

int64_t aqua_nvlink_speed(uint32_t version) {
  if (version >= aqua::cuda::kNvlink50) return 50000;
  return version >= aqua::cuda::kNvlink20 ? 25000 : 20000;
}

int32_t aqua_arena_devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  cudaGetLastError();
  aqua::cuda::set_arena_error(cudaGetErrorString(error));
  return -1;
}

int32_t aqua_arena_identity(int32_t device, char uuid[33], char bus[32]) {
  cudaDeviceProp found;
  cudaError_t error = cudaGetDeviceProperties(&found, device);
  if (error == cudaSuccess) error = cudaDeviceGetPCIBusId(bus, 32, device);
  if (error != cudaSuccess) {
    cudaGetLastError();
    aqua::cuda::set_arena_error(cudaGetErrorString(error));
    return 0;
  }
  for (int i = 0; i < 16; ++i) {
    std::snprintf(uuid + 2 * i, 3, "%02x", static_cast<unsigned char>(found.uuid.bytes[i]));
  }
  return 1;
}

int32_t aqua_arena_topology(int32_t device, int32_t peer, int64_t out[3]) {
  out[0] = out[1] = out[2] = 0;
  int can = 0, count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && (device < 0 || peer < 0 || device >= count || peer >= count)) {
    error = cudaErrorInvalidDevice;
  }
  if (error == cudaSuccess && device == peer) {
    out[0] = 1;
    return 1;
  }
  if (error == cudaSuccess) error = cudaDeviceCanAccessPeer(&can, device, peer);
  if (error != cudaSuccess) {
    cudaGetLastError();
    aqua::cuda::set_arena_error(cudaGetErrorString(error));
    return 0;
  }
  out[0] = can;
  Device ours, theirs;
  if (!nvml().usable || !device_of(device, &ours) || !device_of(peer, &theirs)) return 1;
  // Some drivers say version 5.0 of a H100's links, which are 4.0.
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    cudaGetLastError();
  }
  const int64_t fastest = major < 10 ? 25000 : 50000;
  int status = -1;
  if (nvml().p2p_status(ours, theirs, kP2pNvlink, &status) == kNvmlSuccess && status == kP2pOk) {
    for (unsigned link = 0; link < kMostLinks; ++link) {
      int active = 0;
      unsigned version = 0;
      if (nvml().link_state(ours, link, &active) != kNvmlSuccess || !active) continue;
      if (!leads_to(ours, link, theirs)) continue;
      ++out[1];
      if (nvml().link_version(ours, link, &version) == kNvmlSuccess) {
        out[2] += std::min(aqua_nvlink_speed(version), fastest);
      }
    }
  }
  unsigned generation = 0, width = 0;
  if (out[1] == 0 && nvml().pcie_generation(ours, &generation) == kNvmlSuccess &&
      nvml().pcie_width(ours, &width) == kNvmlSuccess) {
    out[2] = lane_speed(generation) * width;
  }
  return 1;
}
