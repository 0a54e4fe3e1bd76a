// Copies at memory speed, plain or with a checksum on the way.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aqua {

// As memcpy, for memory that nobody here reads soon.
void stream_copy(char* to, const char* from, size_t bytes);

// A 64-bit checksum over runs of bytes, against corruption (not against an adversary).
//
// A run is cut into blocks of eight little-endian 64-bit words, its end padded with zero bytes.
// Lane i (of 8) starts as rotl(kPrime, 8 i) and takes up word i of each block:
//     lane = rotl(lane ^ word, 27) * kPrime            (mod 2^64)
// and the result is, from h = total bytes of all runs, for i = 0 .. 7:
//     h = (h ^ lane) * kPrime;  h ^= h >> 32
// Every step maps its state one to one for a given word, and a word one to one for a given state,
// so a change within one word always shows; others go unseen with probability 2^-64 or so.
class Checksum {
 public:
  Checksum();
  // Takes up one run, and copies it to `to`.
  void copy(char* to, const char* from, size_t bytes);
  uint64_t value() const;

 private:
  uint64_t lanes_[8];
  uint64_t bytes_ = 0;
};

}  // namespace aqua
