// Memory of GPUs that can't be exported as descriptors: CUDA's older IPC, only where it must be.
//
// What travels is a descriptor all the same: a sealed file in memory that names the allocation. Two
// things are worse than with descriptors of the memory itself. It belongs to who made it: when that
// process ends, what others have mapped is undefined by the driver's documentation, while memory
// behind descriptors stays. And a process has only one mapping of it for each of its GPUs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace aqua {
namespace cuda {

// What the file holds.
struct IpcRecord {
  char magic[8];  // kIpcMagic
  uint64_t bytes;
  cudaIpcMemHandle_t handle;
};
constexpr char kIpcMagic[8] = {'A', 'Q', 'U', 'A', 'I', 'P', 'C', '1'};

// A new descriptor of a sealed file with this record, which is made from `memory`, the start of a
// cudaMalloc of the current device; -1 and *error if it can't be.
int ipc_export(void* memory, uint64_t bytes, cudaError_t* error);

// Whether a descriptor is such a file, for at least `bytes` bytes; nobody can change it afterwards.
bool ipc_read(int fd, uint64_t bytes, IpcRecord* record);

// Whether two records are of the same memory.
bool ipc_same(const IpcRecord& a, const IpcRecord& b);

}  // namespace cuda
}  // namespace aqua
