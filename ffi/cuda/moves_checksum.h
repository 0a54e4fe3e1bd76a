// The checksum of ../cpu/moves_copy.h, lane by lane, for host and device.
#pragma once

#include <cstdint>

#include "device.h"

namespace aqua {
namespace cuda {

constexpr uint64_t kChecksumPrime = 0x9E3779B97F4A7C15;

AQUA_HD uint64_t checksum_rotate(uint64_t x, int by) {
  return by == 0 ? x : x << by | x >> (64 - by);
}
// Lane 0 to 7 at the start.
AQUA_HD uint64_t checksum_lane(int lane) { return checksum_rotate(kChecksumPrime, 8 * lane); }
// A lane after one word.
AQUA_HD uint64_t checksum_step(uint64_t lane, uint64_t word) {
  return checksum_rotate(lane ^ word, 27) * kChecksumPrime;
}
// The result, from the lanes and the number of bytes.
AQUA_HD uint64_t checksum_value(const uint64_t lanes[8], uint64_t bytes) {
  uint64_t h = bytes;
  for (int i = 0; i < 8; ++i) {
    h = (h ^ lanes[i]) * kChecksumPrime;
    h ^= h >> 32;
  }
  return h;
}

}  // namespace cuda
}  // namespace aqua
