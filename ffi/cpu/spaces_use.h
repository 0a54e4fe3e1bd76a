// Handlers on CPUs as users of the memory of spaces.
#pragma once

#include <string>

#include "../common/moves.h"
#include "../common/spaces.h"

namespace aqua {

// Makes a handler a user of its spaces' segments for as long as it runs: who retires one waits.
class SpacesInUse {
 public:
  explicit SpacesInUse(const Spaces& spaces) : spaces_(spaces) {
    while (held_ < spaces_.count && hold_segment(handle(held_))) ++held_;
  }
  ~SpacesInUse() {
    while (held_ > 0) release_segment(handle(--held_));
  }
  SpacesInUse(const SpacesInUse&) = delete;
  SpacesInUse& operator=(const SpacesInUse&) = delete;

  // Empty, or what is wrong: a space's memory was retired before this step ran.
  std::string error() const {
    if (held_ == spaces_.count) return "";
    return "space " + std::to_string(held_ + 1) + ": segment " +
           std::to_string(handle(held_).id) + " of generation " +
           std::to_string(handle(held_).generation) +
           " has been retired; wait for dispatched steps before retiring a space";
  }

 private:
  Handle handle(int i) const { return {spaces_.rows[i].segment, spaces_.rows[i].generation}; }

  const Spaces spaces_;
  int held_ = 0;
};

}  // namespace aqua
