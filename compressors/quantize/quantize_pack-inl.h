// Codes of one byte each to and from planes of 4, 2 and 1 bits, and trits (FORMAT.md). Per-target
// include, inside quantize_simd.cpp only.
#if defined(THINWIRE_QUANTIZE_PACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THINWIRE_QUANTIZE_PACK_INL_H_
#undef THINWIRE_QUANTIZE_PACK_INL_H_
#else
#define THINWIRE_QUANTIZE_PACK_INL_H_
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "compressors/core/convert-inl.h"
#include "compressors/quantize/quantize_kernels.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {
namespace {

constexpr std::int64_t kGroup = kQuantizeGroup;

// One plane: bits [kShift, kShift + kWidth) of 64 codes, one a byte, into 8 * kWidth bytes.
template <int kWidth, int kShift>
HWY_INLINE void pack_plane(const std::uint8_t* codes, std::uint8_t* out) {
  constexpr std::size_t kBytes = 8 * kWidth;
  using D = hn::CappedTag < std::uint8_t, kBytes<32 ? kBytes : 32>;
  const D d;
  const auto mask = hn::Set(d, static_cast<std::uint8_t>((1U << kWidth) - 1));
  for (std::size_t j = 0; j < kBytes; j += hn::Lanes(d)) {
    const auto part = [&](std::size_t k) HWY_ATTR {
      return hn::And(hn::ShiftRight<kShift>(hn::LoadU(d, codes + j + k * kBytes)), mask);
    };
    auto byte = part(0);
    if constexpr (kWidth == 4) {
      byte = hn::Or(byte, hn::ShiftLeft<4>(part(1)));
    } else if constexpr (kWidth == 2) {
      byte = hn::Or(byte, hn::ShiftLeft<2>(part(1)));
      byte = hn::Or(byte, hn::Or(hn::ShiftLeft<4>(part(2)), hn::ShiftLeft<6>(part(3))));
    } else if constexpr (kWidth == 1) {
      byte = hn::Or(byte, hn::ShiftLeft<1>(part(1)));
      byte = hn::Or(byte, hn::Or(hn::ShiftLeft<2>(part(2)), hn::ShiftLeft<3>(part(3))));
      byte = hn::Or(byte, hn::Or(hn::ShiftLeft<4>(part(4)), hn::ShiftLeft<5>(part(5))));
      byte = hn::Or(byte, hn::Or(hn::ShiftLeft<6>(part(6)), hn::ShiftLeft<7>(part(7))));
    }
    hn::StoreU(byte, d, out + j);
  }
}

// The inverse of pack_plane: ORs the plane into the codes.
template <int kWidth, int kShift>
HWY_INLINE void unpack_plane(const std::uint8_t* in, std::uint8_t* codes) {
  constexpr std::size_t kBytes = 8 * kWidth;
  using D = hn::CappedTag < std::uint8_t, kBytes<32 ? kBytes : 32>;
  const D d;
  const auto mask = hn::Set(d, static_cast<std::uint8_t>((1U << kWidth) - 1));
  for (std::size_t j = 0; j < kBytes; j += hn::Lanes(d)) {
    const auto byte = hn::LoadU(d, in + j);
    const auto put = [&](std::size_t k, hn::Vec<D> bits) HWY_ATTR {
      std::uint8_t* to = codes + j + k * kBytes;
      const auto part = hn::ShiftLeft<kShift>(hn::And(bits, mask));
      hn::StoreU(kShift == 0 ? part : hn::Or(part, hn::LoadU(d, to)), d, to);
    };
    put(0, byte);
    if constexpr (kWidth == 4) {
      put(1, hn::ShiftRight<4>(byte));
    } else if constexpr (kWidth == 2) {
      put(1, hn::ShiftRight<2>(byte));
      put(2, hn::ShiftRight<4>(byte));
      put(3, hn::ShiftRight<6>(byte));
    } else if constexpr (kWidth == 1) {
      put(1, hn::ShiftRight<1>(byte));
      put(2, hn::ShiftRight<2>(byte));
      put(3, hn::ShiftRight<3>(byte));
      put(4, hn::ShiftRight<4>(byte));
      put(5, hn::ShiftRight<5>(byte));
      put(6, hn::ShiftRight<6>(byte));
      put(7, hn::ShiftRight<7>(byte));
    }
  }
}

template <int kBits>
HWY_INLINE void pack_group(const std::uint8_t* codes, std::uint8_t* out) {
  if constexpr (kBits == 8) {
    std::memcpy(out, codes, kGroup);
  } else {
    constexpr int k4 = kBits & 4;
    constexpr int k2 = kBits & 2;
    if constexpr (k4 != 0) pack_plane<4, 0>(codes, out);
    if constexpr (k2 != 0) pack_plane<2, k4>(codes, out + 8 * k4);
    if constexpr ((kBits & 1) != 0) pack_plane<1, k4 + k2>(codes, out + 8 * (k4 + k2));
  }
}

// Codes of a group, one a byte; kSigned: as signed integers.
template <int kBits, bool kSigned>
HWY_INLINE void unpack_group(const std::uint8_t* in, std::uint8_t* codes) {
  if constexpr (kBits == 8) {
    std::memcpy(codes, in, kGroup);
    return;
  } else {
    constexpr int k4 = kBits & 4;
    constexpr int k2 = kBits & 2;
    if constexpr (k4 != 0) unpack_plane<4, 0>(in, codes);
    if constexpr (k2 != 0) unpack_plane<2, k4>(in + 8 * k4, codes);
    if constexpr ((kBits & 1) != 0) unpack_plane<1, k4 + k2>(in + 8 * (k4 + k2), codes);
  }
  if constexpr (kSigned) {
    const hn::CappedTag<std::uint8_t, 64> d;
    for (std::size_t j = 0; j < kGroup; j += hn::Lanes(d)) {
      const auto code = hn::LoadU(d, codes + j);
      if constexpr (kBits == 1) {  // 0 is +1, 1 is -1
        hn::StoreU(hn::Sub(hn::Set(d, 1), hn::Add(code, code)), d, codes + j);
      } else {
        const auto sign = hn::Set(d, static_cast<std::uint8_t>(1U << (kBits - 1)));
        hn::StoreU(hn::Sub(hn::Xor(code, sign), sign), d, codes + j);
      }
    }
  }
}

template <int kBits>
HWY_NOINLINE void pack_groups(const std::uint8_t* codes, std::int64_t n, std::uint8_t* out) {
  for (std::int64_t i = 0; i < n; i += kGroup) {
    pack_group<kBits>(codes + i, out);
    out += kBits * kGroup / 8;
  }
}
template <int kBits, bool kSigned>
HWY_NOINLINE void unpack_groups(const std::uint8_t* in, std::int64_t n, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; i += kGroup) {
    unpack_group<kBits, kSigned>(in, codes + i);
    in += kBits * kGroup / 8;
  }
}

// Calls f(std::integral_constant<int, bits>).
template <typename F>
HWY_INLINE void with_bits(int bits, F&& f) {
  switch (bits) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 6:
      return f(std::integral_constant<int, 6>());
    case 7:
      return f(std::integral_constant<int, 7>());
    default:
      return f(std::integral_constant<int, 8>());
  }
}

// ---- Five trits a byte.

using Trits = hn::CappedTag<std::uint8_t, 16>;

// Calls f(j) for vectors of [0, bytes), the last of which may overlap the one before; false when
// there are fewer bytes than lanes.
template <typename F>
HWY_INLINE bool for_each_overlapping(std::int64_t bytes, F&& f) {
  const auto step = static_cast<std::int64_t>(hn::Lanes(Trits()));
  if (bytes < step) return false;
  for (std::int64_t j = 0; j + step < bytes; j += step) f(j);
  f(bytes - step);
  return true;
}

// Two-bit codes of -1, 0, 1 of n elements, with room for 64 more; writes to the room.
HWY_NOINLINE void pack_trits(std::uint8_t* codes, std::int64_t n, std::uint8_t* out) {
  const Trits d;
  const std::int64_t bytes = (n + kQuantizeTrits - 1) / kQuantizeTrits;
  std::fill(codes + n, codes + kQuantizeTrits * bytes, std::uint8_t{3});  // a digit of 0
  const bool done = for_each_overlapping(bytes, [&](std::int64_t j) HWY_ATTR {
    auto sum = hn::Zero(d);
    for (std::int64_t digit = kQuantizeTrits - 1; digit >= 0; --digit) {
      const auto code = hn::LoadU(d, codes + digit * bytes + j);
      const auto trit = hn::And(hn::Add(code, hn::Set(d, 1)), hn::Set(d, 3));
      sum = hn::Add(hn::Add(sum, hn::Add(sum, sum)), trit);
    }
    hn::StoreU(sum, d, out + j);
  });
  if (done) return;
  for (std::int64_t j = 0; j < bytes; ++j) {
    unsigned sum = 0;
    for (std::int64_t digit = kQuantizeTrits - 1; digit >= 0; --digit) {
      sum = 3 * sum + ((codes[digit * bytes + j] + 1U) & 3U);
    }
    out[j] = static_cast<std::uint8_t>(sum);
  }
}

// Signed integers; writes to the room, too.
HWY_NOINLINE void unpack_trits(const std::uint8_t* in, std::int64_t n, std::uint8_t* codes) {
  constexpr std::uint8_t kPowers[] = {1, 3, 9, 27, 81};
  const Trits d;
  const std::int64_t bytes = (n + kQuantizeTrits - 1) / kQuantizeTrits;
  const bool done = for_each_overlapping(bytes, [&](std::int64_t j) HWY_ATTR {
    auto rest = hn::LoadU(d, in + j);
    for (std::int64_t digit = kQuantizeTrits - 1; digit >= 0; --digit) {
      auto code = hn::Set(d, 0xFF);
      for (const int times : {2, 1}) {
        const auto least = hn::Set(d, static_cast<std::uint8_t>(times * kPowers[digit]));
        code = hn::Sub(code, hn::VecFromMask(d, hn::Eq(hn::Max(rest, least), rest)));
      }
      hn::StoreU(code, d, codes + digit * bytes + j);
      const auto power = hn::Set(d, kPowers[digit]);
      const auto sent = hn::Add(code, hn::Set(d, 1));
      const auto one = hn::VecFromMask(d, hn::Eq(hn::Max(sent, hn::Set(d, 1)), sent));
      const auto two = hn::VecFromMask(d, hn::Eq(sent, hn::Set(d, 2)));
      rest = hn::Sub(rest, hn::Add(hn::And(one, power), hn::And(two, power)));
    }
  });
  if (done) return;
  for (std::int64_t j = 0; j < bytes; ++j) {
    unsigned rest = in[j];
    for (std::int64_t digit = kQuantizeTrits - 1; digit >= 0; --digit) {
      const unsigned trit = std::min(rest / kPowers[digit], 2U);
      codes[digit * bytes + j] = static_cast<std::uint8_t>(trit + 255U);
      rest -= trit * kPowers[digit];
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();
#endif
