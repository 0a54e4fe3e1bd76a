// Device memory outside XLA's allocator that other processes can map: CUDA virtual memory exported
// as POSIX file descriptors, which travel over Unix sockets as those of host arenas do.
//
// The physical memory lives as long as somebody has it mapped: a lender that dies takes nothing
// away from under a copy. Descriptors keep it alive too, and are closed by who got them.
//
// Where the driver can't export memory so, it is CUDA's older IPC (legacy_ipc.h): the calls are the
// same, the descriptor is of a small file that names the memory. AQUA_LEGACY_IPC=1 asks for that.
#pragma once

#include <cstdint>

extern "C" {

// What went wrong in this thread's last call of this file; empty if nothing did.
const char* aqua_arena_error();

// Makes an arena of at least `bytes` on `device`, filled with zeros. Returns its id (> 0), or 0.
// size: its real size, a multiple of the device's granularity. address: where this process sees it.
// fd: a descriptor to send to borrowers, the caller's to close.
int64_t aqua_arena_create(int32_t device, uint64_t bytes, uint64_t* size, uint64_t* address,
                          int32_t* fd);

// What sizes of arenas of a device are multiples of; 0 on an error.
uint64_t aqua_arena_unit(int32_t device);

// Makes `count` arenas of `bytes` each, a multiple of the unit, at consecutive addresses from *base
// on, as aqua_arena_create does each; their ids and descriptors go to `ids` and `fds`. Only where
// memory can be exported as descriptors. The addresses stay reserved until all have been closed.
// 1 or 0; all or nothing.
int32_t aqua_arena_create_row(int32_t device, int32_t count, uint64_t bytes, uint64_t* base,
                              int64_t* ids, int32_t* fds);

// Maps another process's arena of `size` bytes for use by `count` (1 to 16) devices, which must be
// able to reach the GPU it is on. The descriptor stays the caller's. Returns an id (> 0), or 0.
int64_t aqua_arena_import(const int32_t* devices, int32_t count, int32_t fd, uint64_t size,
                          uint64_t* address);

// How an open arena is shared: 1 by descriptors of the memory, 2 by older IPC; 0 if it isn't open.
int32_t aqua_arena_way(int64_t id);

// Unmaps it. Copies to and from it must have ended (retire its segments first). 1, or 0 if the id
// is not open or the driver refuses.
int32_t aqua_arena_close(int64_t id);

// Overwrites a range with zeros, and waits. 1 or 0.
int32_t aqua_arena_scrub(int64_t id, uint64_t offset, uint64_t bytes);

// The checksum of moves over a range (as one run), and waits. 1 or 0.
int32_t aqua_arena_checksum(int64_t id, uint64_t offset, uint64_t bytes, uint64_t* sum);

// Bytes of `device` that nobody has, and all there are. 1 or 0.
int32_t aqua_arena_memory(int32_t device, uint64_t* free, uint64_t* total);

// GPUs that this process sees; -1 on an error.
int32_t aqua_arena_devices();

// What names a GPU for all processes of a machine, as text that ends with 0. Returns 1, or 0.
//   uuid: its (or its MIG instance's) UUID, 32 hexadecimal digits
//   bus: its PCI address, such as 0000:3b:00.0
int32_t aqua_arena_identity(int32_t device, char uuid[33], char bus[32]);

// How `device` reaches memory of `peer`. Returns 1, or 0 on an error.
//   out[0]: 1 if it can at all (without staging through the host)
//   out[1]: NVLink links of `device` in use, if the two talk through them; 0: PCIe, or unknown
//   out[2]: a hint of the bandwidth one way in MB/s from the link's generation, 0 if unknown.
//           A nominal figure to rank peers by; measure before relying on it.
int32_t aqua_arena_topology(int32_t device, int32_t peer, int64_t out[3]);

// MB/s one way of one NVLink, nominal, by NVML's number of its version.
int64_t aqua_nvlink_speed(uint32_t version);
}
