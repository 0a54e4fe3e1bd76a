#include "legacy_ipc.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

namespace aqua {
namespace cuda {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL;

}  // namespace

int ipc_export(void* memory, uint64_t bytes, cudaError_t* error) {
  IpcRecord record{};
  std::memcpy(record.magic, kIpcMagic, sizeof(kIpcMagic));
  record.bytes = bytes;
  *error = cudaIpcGetMemHandle(&record.handle, memory);
  if (*error != cudaSuccess) return -1;
  *error = cudaErrorOperatingSystem;
  const int fd = memfd_create("aqua-ipc", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return -1;
  if (write(fd, &record, sizeof(record)) != static_cast<ssize_t>(sizeof(record)) ||
      fcntl(fd, F_ADD_SEALS, kSeals) != 0) {
    close(fd);
    return -1;
  }
  *error = cudaSuccess;
  return fd;
}

bool ipc_read(int fd, uint64_t bytes, IpcRecord* record) {
  struct stat found;
  if (fstat(fd, &found) != 0 || !S_ISREG(found.st_mode) ||
      found.st_size != static_cast<off_t>(sizeof(*record))) {
    return false;
  }
  const int seals = fcntl(fd, F_GET_SEALS);
  return seals >= 0 && (seals & kSeals) == kSeals &&
         pread(fd, record, sizeof(*record), 0) == static_cast<ssize_t>(sizeof(*record)) &&
         std::memcmp(record->magic, kIpcMagic, sizeof(kIpcMagic)) == 0 && bytes > 0 &&
         bytes <= record->bytes;
}

bool ipc_same(const IpcRecord& a, const IpcRecord& b) {
  return std::memcmp(&a.handle, &b.handle, sizeof(a.handle)) == 0;
}

}  // namespace cuda
}  // namespace aqua
