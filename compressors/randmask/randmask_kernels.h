// The inner loops of the random mask on plain pointers. Pure functions, thread-safe; the caller
// owns all memory. randmask_simd.cpp and randmask_reference.cpp give the same bits.
#pragma once

#include <cstdint>
#include <span>

#include "compressors/core/random.h"
#include "compressors/core/tensor_view.h"

namespace thinwire {

// Elements sent of n: ceil(density * n), at least 1 and at most n (0 for n = 0).
std::int64_t randmask_count(double density, std::int64_t n);

// The positions: [0, n) is cut into `count` ranges, the i-th from floor(i * n / count), and one
// element of each is drawn uniformly: range i by word i % 4 of random block i / 4. Every element is
// equally likely up to a range's rounding, no position comes twice, and all come in order.
// Calls f(i, position).
template <typename F>
void for_each_position(const RandomStream& stream, std::int64_t count, std::int64_t n, F&& f) {
  const auto begin_of = [=](std::int64_t i) {
    return static_cast<std::int64_t>(static_cast<unsigned __int128>(i) *
                                     static_cast<unsigned __int128>(n) /
                                     static_cast<unsigned __int128>(count));
  };
  std::int64_t begin = 0;
  for (std::int64_t i = 0; i < count; i += 4) {
    const auto words = random_block(stream, static_cast<std::uint64_t>(i / 4));
    for (std::int64_t j = i; j < count && j < i + 4; ++j) {
      const std::int64_t end = begin_of(j + 1);
      const auto width = static_cast<std::uint64_t>(end - begin);
      // Ranges are shorter than 2^32 elements for every density that a spec can give.
      const std::uint64_t offset = words[static_cast<std::size_t>(j % 4)] * width >> 32;
      f(j, begin + static_cast<std::int64_t>(offset));
      begin = end;
    }
  }
}

struct RandmaskSpread {
  TensorView grad;                  // set to +0
  const float* residual = nullptr;  // n values or null
  float decay = 1.0F;
  float* next = nullptr;  // n values, 64-byte aligned, or null: gets v; may equal residual
};

// next = grad + decay * residual, then grad = +0.
void randmask_spread(const RandmaskSpread& args);

}  // namespace thinwire
