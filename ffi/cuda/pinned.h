// Host memory that GPUs copy from and to at full speed, pinned piece by piece as a tier grows.
//
// A segment over memory whose first piece is pinned takes it as it is (move_streams.h, reach): its
// owner pins further pieces before it hands out slots in them, and unpins all after the segment has
// been retired. No copy may cross two pieces.
#pragma once

#include <cstdint>

extern "C" {

// Pins [base, base + bytes), whole pages, for all GPUs, at the same address as the host's. Takes
// about as long as writing to it. Null, or why not.
const char* aqua_host_pin(int32_t device, void* base, uint64_t bytes);

// Undoes one aqua_host_pin of the same piece. No copy may be under way in it. Null, or why not.
const char* aqua_host_unpin(int32_t device, void* base, uint64_t bytes);

// Copies between any two addresses, the host's or a GPU's, and waits; on a stream that no other work
// waits for. Null, or why not.
const char* aqua_host_copy(int32_t device, void* to, const void* from, uint64_t bytes);

// Bytes that are pinned by these calls now.
uint64_t aqua_host_pinned();
}
