#include "arena.h"

#include <unistd.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "device.h"
#include "driver.h"
#include "legacy_ipc.h"
#include "moves.h"

namespace {

using aqua::cuda::describe;
using aqua::cuda::driver;
using aqua::cuda::IpcRecord;
using aqua::cuda::OnDevice;

// kVirtual: of the driver's virtual memory. The others are older IPC's: made here, opened here, and
// seen through the mapping of the arena of this process that it is.
enum class Way { kVirtual, kIpcMade, kIpcOpened, kIpcOurs };

// Addresses without memory, until nobody needs them.
struct Addresses {
  CUdeviceptr base = 0;
  size_t size = 0;
  ~Addresses() {
    if (base != 0) driver().unreserve(base, size);
  }
};

struct Arena {
  std::vector<int> devices;  // that may use it; the first one scrubs
  std::shared_ptr<Addresses> range;  // that it is mapped in, if it is kVirtual
  CUdeviceptr address = 0;
  size_t size = 0;
  Way way = Way::kVirtual;
  CUmemGenericAllocationHandle handle = 0;
  IpcRecord record{};
};

constexpr int kMostDevices = 16;

std::mutex lock;
auto& arenas = *new std::map<int64_t, Arena>;  // never destroyed: the driver may end before us
int64_t next_id = 1;
thread_local std::string last_error;

bool fail(const std::string& what) {
  last_error = what;
  return false;
}

bool ok(CUresult status, const char* what) {
  return status == CUDA_SUCCESS || fail(std::string(what) + ": " + describe(status));
}

bool ok(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return true;
  cudaGetLastError();
  return fail(std::string(what) + ": " + cudaGetErrorString(status));
}

// Whether the device is current, its context there, and the driver's functions known.
bool ready(const OnDevice& on) {
  last_error.clear();
  if (!driver().missing.empty()) return fail("no usable CUDA driver: " + driver().missing);
  return ok(on.status(), "cudaSetDevice") && ok(cudaFree(nullptr), "CUDA context");
}

CUmemAllocationProp properties(int32_t device) {
  CUmemAllocationProp p{};
  p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  p.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  p.location.id = device;
  p.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return p;
}

// Whether memory of `device` can be exported as descriptors of its own.
bool has_descriptors(int32_t device) {
  const char* asked = std::getenv("AQUA_LEGACY_IPC");
  if (asked != nullptr && std::string(asked) == "1") return false;
  CUdevice found;
  if (driver().device_get(&found, device) != CUDA_SUCCESS) return false;
  for (const CUdevice_attribute needed :
       {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
        CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED}) {
    int there = 0;
    if (driver().device_attribute(&there, needed, found) != CUDA_SUCCESS || there == 0) {
      return false;
    }
  }
  return true;
}

// Reserves addresses.
std::shared_ptr<Addresses> reserve(size_t size) {
  auto found = std::make_shared<Addresses>();
  if (!ok(driver().reserve(&found->base, size, 0, 0, 0), "reserving addresses")) return nullptr;
  found->size = size;
  return found;
}

// Maps `arena->handle` for its devices, where it has addresses already or anywhere; what was begun
// is undone if it fails.
bool map(Arena* arena) {
  if (arena->range == nullptr) {
    arena->range = reserve(arena->size);
    if (arena->range == nullptr) return false;
    arena->address = arena->range->base;
  }
  if (ok(driver().map(arena->address, arena->size, 0, arena->handle, 0), "mapping")) {
    std::vector<CUmemAccessDesc> access(arena->devices.size());
    for (size_t i = 0; i < access.size(); ++i) {
      access[i].location.type = CU_MEM_LOCATION_TYPE_DEVICE;
      access[i].location.id = arena->devices[i];
      access[i].flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    }
    if (ok(driver().set_access(arena->address, arena->size, access.data(), access.size()),
           "access (can this GPU reach the other one's memory?)")) {
      return true;
    }
    driver().unmap(arena->address, arena->size);
  }
  arena->range.reset();
  return false;
}

int64_t keep(const Arena& arena) {
  std::lock_guard<std::mutex> guard(lock);
  arenas[next_id] = arena;
  return next_id++;
}

// The address of a range of an arena, 0 if there is no such range.
uint64_t range(int64_t id, uint64_t offset, uint64_t bytes, int32_t* device) {
  std::lock_guard<std::mutex> guard(lock);
  const auto found = arenas.find(id);
  if (found == arenas.end()) return fail("no such arena"), 0;
  const Arena& arena = found->second;
  if (bytes == 0 || bytes > arena.size || offset > arena.size - bytes) {
    return fail("a range outside the arena"), 0;
  }
  *device = arena.devices.front();
  return arena.address + offset;
}

// A stream that doesn't wait for others, for one call.
class Stream {
 public:
  Stream() { made_ = ok(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); }
  ~Stream() {
    if (made_) cudaStreamDestroy(stream_);
  }
  bool made() const { return made_; }
  cudaStream_t get() const { return stream_; }
  bool wait() const { return ok(cudaStreamSynchronize(stream_), "waiting"); }

 private:
  cudaStream_t stream_ = nullptr;
  bool made_;
};

// Fills an arena with zeros, and waits.
bool clear(const Arena& arena) {
  Stream stream;
  return stream.made() &&
         ok(cudaMemsetAsync(reinterpret_cast<void*>(arena.address), 0, arena.size, stream.get()),
            "clearing") &&
         stream.wait();
}

size_t unit_of(int32_t device) {
  const CUmemAllocationProp wanted = properties(device);
  size_t unit = 0;
  return ok(driver().granularity(&unit, &wanted, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
            "granularity")
             ? unit
             : 0;
}

// Memory of the driver's virtual memory, exported as a descriptor of itself.
bool create_virtual(Arena* arena, uint64_t bytes, int32_t* fd) {
  const CUmemAllocationProp wanted = properties(arena->devices.front());
  const size_t unit = unit_of(arena->devices.front());
  if (unit == 0) return false;
  if (bytes > UINT64_MAX - unit) return fail("size: too large");
  arena->size = (bytes + unit - 1) / unit * unit;
  if (!ok(driver().create(&arena->handle, arena->size, &wanted, 0), "allocating")) return false;
  if (map(arena)) {
    if (clear(*arena) &&
        ok(driver().export_handle(fd, arena->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
           "exporting a descriptor")) {
      return true;
    }
    driver().unmap(arena->address, arena->size);
    arena->range.reset();
  }
  driver().release(arena->handle);
  return false;
}

// Memory of the runtime's own, named by older IPC.
bool create_ipc(Arena* arena, uint64_t bytes, int32_t* fd) {
  // What small allocations share is exported as a whole: take what nobody shares.
  constexpr uint64_t kUnit = 2 << 20;
  if (bytes > UINT64_MAX - kUnit) return fail("size: too large");
  arena->way = Way::kIpcMade;
  arena->size = (bytes + kUnit - 1) / kUnit * kUnit;
  void* memory = nullptr;
  if (!ok(cudaMalloc(&memory, arena->size), "allocating")) return false;
  arena->address = reinterpret_cast<CUdeviceptr>(memory);
  cudaError_t error = cudaSuccess;
  if (clear(*arena)) {
    *fd = aqua::cuda::ipc_export(memory, arena->size, &error);
    if (*fd >= 0 && aqua::cuda::ipc_read(*fd, arena->size, &arena->record)) return true;
    if (*fd >= 0) close(*fd);
    *fd = -1;
    ok(error != cudaSuccess ? error : cudaErrorOperatingSystem, "exporting by older IPC");
  }
  cudaFree(memory);
  return false;
}

bool import_virtual(Arena* arena, int32_t fd) {
  void* descriptor = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  if (!ok(driver().import_handle(&arena->handle, descriptor,
                                 CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
          "importing a descriptor")) {
    return false;
  }
  if (map(arena)) return true;
  driver().release(arena->handle);
  return false;
}

bool import_ipc(Arena* arena) {
  if (arena->devices.size() != 1) return fail("older IPC maps memory for one GPU at a time");
  {
    // A process can't open what it has made.
    std::lock_guard<std::mutex> guard(lock);
    for (const auto& entry : arenas) {
      const Arena& made = entry.second;
      if (made.way != Way::kIpcMade || !aqua::cuda::ipc_same(made.record, arena->record)) continue;
      arena->way = Way::kIpcOurs;
      arena->address = made.address;
      if (made.devices.front() == arena->devices.front()) return true;
      const cudaError_t peer = cudaDeviceEnablePeerAccess(made.devices.front(), 0);
      if (peer != cudaErrorPeerAccessAlreadyEnabled) return ok(peer, "access to the other GPU");
      cudaGetLastError();
      return true;
    }
  }
  arena->way = Way::kIpcOpened;
  void* memory = nullptr;
  if (!ok(cudaIpcOpenMemHandle(&memory, arena->record.handle, cudaIpcMemLazyEnablePeerAccess),
          "opening by older IPC (can this GPU reach the other one's memory?)")) {
    return false;
  }
  arena->address = reinterpret_cast<CUdeviceptr>(memory);
  return true;
}

}  // namespace

void aqua::cuda::set_arena_error(const std::string& what) { last_error = what; }

const char* aqua_arena_error() { return last_error.c_str(); }

int64_t aqua_arena_create(int32_t device, uint64_t bytes, uint64_t* size, uint64_t* address,
                          int32_t* fd) {
  const OnDevice on(device);
  if (!ready(on)) return 0;
  if (bytes == 0) return fail("size: got 0; allowed: > 0");
  Arena arena;
  arena.devices = {device};
  if (!(has_descriptors(device) ? create_virtual(&arena, bytes, fd)
                                : create_ipc(&arena, bytes, fd))) {
    return 0;
  }
  *size = arena.size;
  *address = arena.address;
  return keep(arena);
}

uint64_t aqua_arena_unit(int32_t device) {
  const OnDevice on(device);
  return ready(on) ? unit_of(device) : 0;
}

int32_t aqua_arena_create_row(int32_t device, int32_t count, uint64_t bytes, uint64_t* base,
                              int64_t* ids, int32_t* fds) {
  const OnDevice on(device);
  if (!ready(on)) return 0;
  if (!has_descriptors(device)) return fail("this driver can't export memory as descriptors");
  const size_t unit = unit_of(device);
  if (unit == 0) return 0;
  if (count < 1 || bytes == 0 || bytes % unit != 0 || bytes > UINT64_MAX / count) {
    return fail("allowed: at least one arena, of multiples of " + std::to_string(unit) + " bytes");
  }
  const std::shared_ptr<Addresses> range = reserve(bytes * count);
  if (range == nullptr) return 0;
  for (int32_t i = 0; i < count; ++i) {
    Arena arena;
    arena.devices = {device};
    arena.range = range;
    arena.address = range->base + i * bytes;
    if (create_virtual(&arena, bytes, fds + i)) {
      ids[i] = keep(arena);
      continue;
    }
    const std::string why = last_error;
    while (--i >= 0) {
      close(fds[i]);
      aqua_arena_close(ids[i]);
    }
    return fail(why);
  }
  *base = range->base;
  return 1;
}

int64_t aqua_arena_import(const int32_t* devices, int32_t count, int32_t fd, uint64_t size,
                          uint64_t* address) {
  if (count < 1 || count > kMostDevices) return fail("devices: allowed: 1 to 16");
  const OnDevice on(devices[0]);
  if (!ready(on)) return 0;
  Arena arena;
  arena.devices.assign(devices, devices + count);
  arena.size = size;
  const bool ipc = aqua::cuda::ipc_read(fd, size, &arena.record);
  if (!(ipc ? import_ipc(&arena) : import_virtual(&arena, fd))) return 0;
  *address = arena.address;
  return keep(arena);
}

int32_t aqua_arena_way(int64_t id) {
  std::lock_guard<std::mutex> guard(lock);
  const auto found = arenas.find(id);
  if (found == arenas.end()) return 0;
  return found->second.way == Way::kVirtual ? 1 : 2;
}

int32_t aqua_arena_close(int64_t id) {
  Arena arena;
  {
    std::lock_guard<std::mutex> guard(lock);
    const auto found = arenas.find(id);
    if (found == arenas.end()) return fail("no such arena");
    arena = found->second;
    arenas.erase(found);
  }
  const OnDevice on(arena.devices.front());
  if (!ready(on)) return 0;
  void* const memory = reinterpret_cast<void*>(arena.address);
  switch (arena.way) {
    case Way::kIpcMade:
      return ok(cudaFree(memory), "freeing");
    case Way::kIpcOpened:
      return ok(cudaIpcCloseMemHandle(memory), "closing by older IPC");
    case Way::kIpcOurs:
      return 1;
    case Way::kVirtual:
      break;
  }
  // The addresses go with the last arena in them, when `arena` ends.
  const bool unmapped = ok(driver().unmap(arena.address, arena.size), "unmapping");
  return ok(driver().release(arena.handle), "releasing") && unmapped;
}

int32_t aqua_arena_scrub(int64_t id, uint64_t offset, uint64_t bytes) {
  int32_t device = 0;
  const uint64_t at = range(id, offset, bytes, &device);
  if (at == 0) return 0;
  const OnDevice on(device);
  if (!ready(on)) return 0;
  Stream stream;
  return stream.made() &&
         ok(cudaMemsetAsync(reinterpret_cast<void*>(at), 0, bytes, stream.get()), "scrubbing") &&
         stream.wait();
}

int32_t aqua_arena_checksum(int64_t id, uint64_t offset, uint64_t bytes, uint64_t* sum) {
  int32_t device = 0;
  const uint64_t at = range(id, offset, bytes, &device);
  if (at == 0) return 0;
  const OnDevice on(device);
  if (!ready(on)) return 0;
  if (bytes > INT32_MAX) return fail("a range of 2 GiB or more");
  Stream stream;
  void *host = nullptr, *mapped = nullptr;
  if (!stream.made() || !ok(cudaHostAlloc(&host, sizeof(*sum), cudaHostAllocMapped), "pinning")) {
    return 0;
  }
  aqua::cuda::Pieces pieces;
  pieces.count = 1;
  pieces.pieces[0] = {reinterpret_cast<const char*>(at), nullptr, static_cast<int32_t>(bytes), 1,
                      0, 0};
  const bool done =
      ok(cudaHostGetDevicePointer(&mapped, host, 0), "pinning") &&
      ok(aqua::cuda::copy_checked(pieces, static_cast<uint64_t*>(mapped), stream.get()),
         "the checksum") &&
      stream.wait();
  if (done) *sum = *static_cast<uint64_t*>(host);
  cudaFreeHost(host);
  return done;
}

int32_t aqua_arena_memory(int32_t device, uint64_t* free, uint64_t* total) {
  const OnDevice on(device);
  if (!ready(on)) return 0;
  size_t unused = 0, all = 0;
  if (!ok(cudaMemGetInfo(&unused, &all), "cudaMemGetInfo")) return 0;
  *free = unused;
  *total = all;
  return 1;
}
