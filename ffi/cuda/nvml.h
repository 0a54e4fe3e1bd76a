// The part of NVML that topology.cc uses. Its header doesn't come with the compiler, and its
// library is found at run time; tests/ops/test_cuda_interfaces.py compares this with the header.
#pragma once

namespace aqua {
namespace cuda {

using NvmlDevice = struct NvmlDeviceHandle*;

struct NvmlPci {  // nvmlPciInfo_t
  char short_name[16];
  unsigned domain, bus, device, id, subsystem;
  char name[32];
};

constexpr int kNvmlSuccess = 0;
// Links that may be asked for: more than a GPU has is an answer like any other.
constexpr int kMostLinks = 36;        // NVML_NVLINK_MAX_LINKS
constexpr int kP2pNvlink = 2;         // NVML_P2P_CAPS_INDEX_NVLINK
constexpr int kP2pOk = 0;             // NVML_P2P_STATUS_OK
constexpr int kRemoteGpu = 0;         // NVML_NVLINK_DEVICE_TYPE_GPU
// nvmlDeviceGetNvLinkVersion's numbers, which aren't those of generations.
constexpr unsigned kNvlink20 = 2;     // NVML_NVLINK_VERSION_2_0
constexpr unsigned kNvlink50 = 7;     // NVML_NVLINK_VERSION_5_0

}  // namespace cuda
}  // namespace aqua
