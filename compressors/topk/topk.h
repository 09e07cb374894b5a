// Top-k: sends the k largest entries of v = gradient + residual by magnitude, and keeps the rest in
// the residual (Lin et al., Deep Gradient Compression, ICLR 2018, arXiv 1712.01887; error feedback
// after Stich et al., Sparsified SGD with Memory, NeurIPS 2018). Indices travel as Rice-coded gaps
// or as a bitmap, values as fp32, bf16 or 1 to 8 bits; what rounding loses stays in the residual.
//
// The codec is immutable and safe to call from several threads. It owns nothing of the caller's.
// The selection, and so the body, is the same on every SIMD target and thread count.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"

namespace thinwire {

enum class TopKValues : std::uint8_t {
  kF32 = 0,      // exact
  kBF16 = 1,     // round to nearest even
  kQ8 = 2,       // sign and 7 bits between the smallest and the block's largest magnitude
  kQ4 = 3,       // the same with 3 bits
  kQ2 = 4,       // the same with 1 bit
  kTernary = 5,  // sign; one magnitude, the mean (Sattler et al., STC, arXiv 1903.02891)
};

// As specs spell them, in the order of TopKValues.
inline constexpr std::array<std::string_view, 6> kTopKValuesWords = {"fp32", "bf16", "q8",
                                                                     "q4",   "q2",   "ternary"};

enum class TopKSelect : std::uint8_t {
  kExact,    // exactly the k largest magnitudes, ties to the lowest index; zeros are never sent
  kSampled,  // all that pass a threshold estimated from a sample, between 0.8 k and k of them
  kCarried,  // the same by the threshold of the step before, corrected; it is in Memory's state
};

// As specs spell them, in the order of TopKSelect.
inline constexpr std::array<std::string_view, 3> kTopKSelectWords = {"exact", "sampled", "carried"};

// What the entries are selected from.
enum class TopKScope : std::uint8_t {
  kLayer,   // one tensor
  kBucket,  // all of the same codec that travel together, as one (JointCodec)
};

// As specs spell them, in the order of TopKScope.
inline constexpr std::array<std::string_view, 2> kTopKScopeWords = {"layer", "bucket"};

// Whose L2 norm local clipping goes by.
enum class TopKClipNorm : std::uint8_t {
  kTensor,  // the gradient's own: one more pass over it
  kLast,    // the last step's, which is in Memory's state; at the first step its own
};

// As specs spell them, in the order of TopKClipNorm.
inline constexpr std::array<std::string_view, 2> kTopKClipNormWords = {"tensor", "last"};

// Momentum correction (Lin et al. 2018, section 3): a local velocity u, in Memory, and its sum v.
// With g' = min(1, clip * P^(-1/2) / |g|) g, P the number of ranks: u = m u + g', v = decay v + u;
// Nesterov: u = m (u + g'), v = decay v + (u + g'). Where an entry is sent u becomes zero, and of v
// only what rounding lost is left. Such a codec needs a Memory with a velocity. An all-zero
// gradient leaves u as it is, too.
struct TopKMomentum {
  double factor = 0.9;  // m in [0, 1)
  bool nesterov = false;
  double clip = 0;  // of gradients without their loss scale, above 0; 0: they are not clipped
  TopKClipNorm clip_norm = TopKClipNorm::kTensor;
};

inline constexpr std::int64_t kMinTopKChunk = 64;
inline constexpr std::int64_t kMaxTopKChunk = 65536;

struct TopKOptions {
  // Exactly one of the two is set. density in (0, 1]: k = max(1, round(density * n)), n the
  // elements that are selected from together.
  double density = 0;
  std::int64_t k = 0;
  // The k largest of every `chunk` elements, the last ones perhaps fewer (SparseLoCo, arXiv
  // 2508.15706); 0: of the tensor. In [kMinTopKChunk, kMaxTopKChunk] else.
  std::int64_t chunk = 0;
  TopKValues values = TopKValues::kF32;
  TopKSelect select = TopKSelect::kExact;
  // kBucket: neither chunks nor momentum, and select is exact.
  TopKScope scope = TopKScope::kLayer;
  std::optional<TopKMomentum> momentum = {};
};

// InvalidArgument for options out of range. A tensor of the codec, and what is selected from
// together, has less than 2^32 elements.
std::shared_ptr<const PayloadCodec> make_topk_codec(const TopKOptions& options);

extern const Family kTopKFamily;

}  // namespace thinwire
