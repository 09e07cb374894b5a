// Gradients to test codecs with: named patterns that hit their corners, any dtype, reproducible.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "compressors/core/dtype.h"
#include "compressors/core/tensor_view.h"

namespace thinwire {

enum class Pattern {
  kNormal,
  kZero,         // +0 and -0
  kEqual,        // one value
  kSparse,       // nine of ten are zero
  kSpike,        // one value 10^6 times the others
  kDenormal,     // below the smallest normal fp32, with zeros between
  kHuge,         // up to the largest finite value
  kAlternating,  // +x, -x with small steps: many near-ties
};
inline constexpr Pattern kPatterns[] = {Pattern::kNormal, Pattern::kZero,       Pattern::kEqual,
                                        Pattern::kSparse, Pattern::kSpike,      Pattern::kDenormal,
                                        Pattern::kHuge,   Pattern::kAlternating};
std::string name(Pattern pattern);

// fp32 values of the pattern, the same for the same arguments everywhere.
std::vector<float> make_values(Pattern pattern, std::int64_t n, std::uint64_t seed);

// An array of any dtype with guard bytes on both sides, `shift` elements off the alignment of 64.
class Array {
 public:
  Array(DType dtype, std::int64_t n, std::int64_t shift = 0);
  // Rounded to dtype; finite values stay finite.
  Array(DType dtype, const std::vector<float>& values, std::int64_t shift = 0);

  TensorView view();
  std::vector<float> values() const;
  // The elements' bytes.
  std::vector<std::byte> bytes() const;
  bool guards_intact() const;
  // Element i := x, rounded as IEEE 754 says (NaN and Inf stay).
  void set(std::int64_t i, float x);

 private:
  static constexpr std::size_t kGuardBytes = 64;
  std::byte* begin();
  const std::byte* begin() const;
  DType dtype_;
  std::int64_t n_;
  std::size_t offset_;
  std::vector<std::byte> storage_;
};

}  // namespace thinwire
