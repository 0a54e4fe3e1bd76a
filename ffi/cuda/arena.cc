#include "arena.h"

#include <map>
#include <mutex>
#include <string>

#include "device.h"
#include "driver.h"
#include "moves.h"

namespace {

using aqua::cuda::describe;
using aqua::cuda::driver;
using aqua::cuda::OnDevice;

struct Arena {
  int device;
  CUdeviceptr address;
  size_t size;
  CUmemGenericAllocationHandle handle;
};

std::mutex lock;
std::map<int64_t, Arena> arenas;
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

// Maps `arena->handle` for its device; what was begun is undone if it fails.
bool map(Arena* arena) {
  if (!ok(driver().reserve(&arena->address, arena->size, 0, 0, 0), "reserving addresses")) {
    return false;
  }
  if (ok(driver().map(arena->address, arena->size, 0, arena->handle, 0), "mapping")) {
    CUmemAccessDesc access{};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = arena->device;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    if (ok(driver().set_access(arena->address, arena->size, &access, 1),
           "access (can this GPU reach the other one's memory?)")) {
      return true;
    }
    driver().unmap(arena->address, arena->size);
  }
  driver().unreserve(arena->address, arena->size);
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
  *device = arena.device;
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

}  // namespace

void aqua::cuda::set_arena_error(const std::string& what) { last_error = what; }

const char* aqua_arena_error() { return last_error.c_str(); }

int64_t aqua_arena_create(int32_t device, uint64_t bytes, uint64_t* size, uint64_t* address,
                          int32_t* fd) {
  const OnDevice on(device);
  if (!ready(on)) return 0;
  if (bytes == 0) return fail("size: got 0; allowed: > 0");
  const CUmemAllocationProp wanted = properties(device);
  size_t unit = 0;
  if (!ok(driver().granularity(&unit, &wanted, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
          "granularity")) {
    return 0;
  }
  if (bytes > UINT64_MAX - unit) return fail("size: too large");
  Arena arena{device, 0, (bytes + unit - 1) / unit * unit, 0};
  if (!ok(driver().create(&arena.handle, arena.size, &wanted, 0), "allocating")) return 0;
  if (map(&arena)) {
    Stream stream;
    if (stream.made() &&
        ok(cudaMemsetAsync(reinterpret_cast<void*>(arena.address), 0, arena.size, stream.get()),
           "clearing") &&
        stream.wait() &&
        ok(driver().export_handle(fd, arena.handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
           "exporting a descriptor")) {
      *size = arena.size;
      *address = arena.address;
      return keep(arena);
    }
    driver().unmap(arena.address, arena.size);
    driver().unreserve(arena.address, arena.size);
  }
  driver().release(arena.handle);
  return 0;
}

int64_t aqua_arena_import(int32_t device, int32_t fd, uint64_t size, uint64_t* address) {
  const OnDevice on(device);
  if (!ready(on)) return 0;
  Arena arena{device, 0, size, 0};
  void* descriptor = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  if (!ok(driver().import_handle(&arena.handle, descriptor,
                                 CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
          "importing a descriptor")) {
    return 0;
  }
  if (map(&arena)) {
    *address = arena.address;
    return keep(arena);
  }
  driver().release(arena.handle);
  return 0;
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
  const OnDevice on(arena.device);
  if (!ready(on)) return 0;
  const bool unmapped = ok(driver().unmap(arena.address, arena.size), "unmapping");
  const bool freed = unmapped && ok(driver().unreserve(arena.address, arena.size), "addresses");
  return ok(driver().release(arena.handle), "releasing") && freed;
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
