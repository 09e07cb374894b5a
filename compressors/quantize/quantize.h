// Blockwise quantisation to 1..8 bits: each block of v = gradient + residual has a scale, and each
// element a code of a few bits. The kinds differ in what the scale and the codes are; formulas and
// bytes: FORMAT.md.
//
// Codes at random can add more error to a residual than error feedback takes away in a step
// (FORMAT.md, qsgd): few bits without bias are made for ef=off.
//
// The codec is immutable and safe to call from several threads; it owns nothing of the caller's.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string_view>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"

namespace thinwire {

inline constexpr std::int64_t kMinQuantizeBlock = 64;
inline constexpr std::int64_t kMaxQuantizeBlock = 4096;  // 16 KiB of fp32: a block stays in L1
inline constexpr std::int64_t kQuantizeBlockStep = 64;
// kMx: a power of two in between.
inline constexpr std::int64_t kMinMxBlock = 32;
inline constexpr std::int64_t kMaxMxBlock = 256;

enum class QuantizeKind : std::uint8_t {
  kMaxAbs,    // integers times a scale, by the largest magnitude (CGX, Markov et al., 2022)
  kMaxMin,    // equal steps from the block's least value to its largest
  kQsgd,      // integers by the norm, at random (QSGD, Alistarh et al., NeurIPS 2017)
  kTernGrad,  // -1, 0, 1 at random, clipped at 2.5 sigma (TernGrad, Wen et al., NeurIPS 2017)
  kNatural,   // powers of two, at random (Horvath et al., Natural Compression, MSML 2022)
  kMx,        // floats of 4 to 8 bits, scaled by powers of two (OCP Microscaling Formats 1.0, 2023)
};

// Elements of kMx: exponent and mantissa bits beside the sign.
enum class MxElement : std::uint8_t { kE4M3, kE5M2, kE2M3, kE3M2, kE2M1 };

struct QuantizeOptions {
  int bits = 8;  // [1, 8]; kQsgd, kNatural: [2, 8]; kTernGrad: 2; kMx: its element's
  QuantizeKind kind = QuantizeKind::kMaxAbs;
  MxElement element = MxElement::kE4M3;  // kMx only
  std::int64_t block = 256;              // elements a scale; a multiple of kQuantizeBlockStep
  bool stochastic = false;               // kQsgd, kTernGrad and kNatural need it
  // Codes a randomised Hadamard rotation of v (Suresh et al., ICML 2017), which spreads outliers
  // over max(1024, block) elements. The block must be a power of two.
  bool rotate = false;
};

// As specs spell them.
inline constexpr std::array<std::string_view, 6> kQuantizeKindWords = {
    "maxabs", "maxmin", "qsgd", "terngrad", "natural", "mx"};
inline constexpr std::array<std::string_view, 5> kMxElementWords = {"e4m3", "e5m2", "e2m3", "e3m2",
                                                                    "e2m1"};
// What specs leave out.
constexpr std::int64_t default_quantize_block(QuantizeKind kind) {
  return kind == QuantizeKind::kMx ? 32 : 256;
}
constexpr MxElement default_mx_element(int bits) {
  if (bits == 8) return MxElement::kE4M3;
  return bits == 6 ? MxElement::kE2M3 : MxElement::kE2M1;
}
constexpr int mx_bits(MxElement element) {
  if (element == MxElement::kE4M3 || element == MxElement::kE5M2) return 8;
  return element == MxElement::kE2M1 ? 4 : 6;
}
constexpr bool always_stochastic(QuantizeKind kind) {
  return kind == QuantizeKind::kQsgd || kind == QuantizeKind::kTernGrad ||
         kind == QuantizeKind::kNatural;
}

// InvalidArgument for options out of range.
std::shared_ptr<const PayloadCodec> make_quantize_codec(const QuantizeOptions& options);

extern const Family kQuantizeFamily;

}  // namespace thinwire
