#include "compressors/core/packed_residual_kernels.h"

#include <bit>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/core/packed_residual_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include "compressors/core/convert-inl.h"
#include "compressors/core/random-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {
namespace {

using I8 = hn::Rebind<std::int8_t, F32>;

std::int64_t row_lanes() { return static_cast<std::int64_t>(hn::Lanes(F32())); }

template <typename Round>
HWY_INLINE void for_each_vector(Round&& round) {
  for (std::int64_t i = 0; i < kPackedGroup; i += row_lanes()) round(i);
}

// Calls round(i, noise) for all vectors of the group.
template <typename Round>
HWY_INLINE void with_noise(const Dither& dither, std::int64_t group, Round&& round) {
  for (std::int64_t row = 0; row < kPackedGroup; row += 32) {
    for (std::int64_t i = row; i < row + 16; i += row_lanes()) {
      const auto element = static_cast<std::uint32_t>(kPackedGroup * group + i);
      const DitherPair noise = dither_pair(dither, element);
      round(i, noise.low);
      round(i + 16, noise.high);
    }
  }
}

void pack_bf16(const float* values, const Dither* dither, std::int64_t group, std::byte* out) {
  if (dither == nullptr) {
    for_each_vector([&](std::int64_t i) HWY_ATTR {
      store_bits16(bf16_bits<true>(hn::LoadU(F32(), values + i)), out + 2 * i);
    });
    return;
  }
  with_noise(*dither, group, [&](std::int64_t i, VU32 noise) HWY_ATTR {
    const VU32 bits = dithered_bf16_bits(hn::LoadU(F32(), values + i), noise);
    store_bits16(hn::ShiftRight<16>(bits), out + 2 * i);
  });
}

std::uint32_t largest_bits(const float* values) {
  auto largest = hn::Zero(I32());
  for (std::int64_t i = 0; i < kPackedBlock; i += row_lanes()) {
    largest = hn::Max(largest, magnitude_bits(hn::LoadU(F32(), values + i)));
  }
  return static_cast<std::uint32_t>(hn::GetLane(hn::MaxOfLanes(I32(), largest)));
}

void pack_q8(const float* values, const Dither* dither, std::int64_t group, std::byte* out) {
  const F32 df;
  float inverse[kPackedGroup / kPackedBlock];
  for (std::int64_t block = 0; block < kPackedGroup / kPackedBlock; ++block) {
    const std::uint32_t scale = packed_scale(largest_bits(values + block * kPackedBlock));
    inverse[block] = scale == 0 ? 0 : std::bit_cast<float>((254 - scale) << 23);
    out[kPackedGroup + block] = static_cast<std::byte>(scale);
  }
  const auto scaled = [&](std::int64_t i) HWY_ATTR {
    const VF32 x = hn::Mul(hn::LoadU(df, values + i), hn::Set(df, inverse[i / kPackedBlock]));
    return hn::Clamp(x, hn::Set(df, -kLargestCode), hn::Set(df, kLargestCode));
  };
  const auto store = [&](VF32 code, std::int64_t i) HWY_ATTR {
    hn::StoreU(hn::DemoteTo(I8(), hn::ConvertTo(I32(), code)), I8(),
               reinterpret_cast<std::int8_t*>(out + i));
  };
  if (dither == nullptr) {
    for_each_vector([&](std::int64_t i) HWY_ATTR { store(hn::Round(scaled(i)), i); });
    return;
  }
  with_noise(*dither, group, [&](std::int64_t i, VU32 noise) HWY_ATTR {
    const VF32 uniform =
        hn::Mul(hn::ConvertTo(df, hn::BitCast(I32(), noise)), hn::Set(df, 0x1p-16F));
    store(hn::Floor(hn::Add(scaled(i), uniform)), i);
  });
}

void pack(ResidualStorage storage, const float* values, const Dither* dither, std::int64_t group,
          std::int64_t count, std::byte* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (storage == ResidualStorage::kBF16) {
      pack_bf16(values, dither, group + i, out);
    } else {
      pack_q8(values, dither, group + i, out);
    }
    values += kPackedGroup;
    out += packed_group_bytes(storage);
  }
}

void unpack_bf16(const std::byte* in, float* values) {
  for_each_vector([&](std::int64_t i) HWY_ATTR {
    hn::StoreU(float_from_bf16_bits(load_bits16(in + 2 * i)), F32(), values + i);
  });
}

void unpack_q8(const std::byte* in, float* values) {
  for_each_vector([&](std::int64_t i) HWY_ATTR {
    const auto biased = std::to_integer<std::uint32_t>(in[kPackedGroup + i / kPackedBlock]);
    const auto codes = hn::LoadU(I8(), reinterpret_cast<const std::int8_t*>(in + i));
    const VF32 code = hn::ConvertTo(F32(), hn::PromoteTo(I32(), codes));
    hn::StoreU(hn::Mul(code, hn::Set(F32(), std::bit_cast<float>(biased << 23))), F32(),
               values + i);
  });
}

void unpack(ResidualStorage storage, const std::byte* in, std::int64_t count, float* values) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (storage == ResidualStorage::kBF16) {
      unpack_bf16(in, values);
    } else {
      unpack_q8(in, values);
    }
    values += kPackedGroup;
    in += packed_group_bytes(storage);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire {

HWY_EXPORT(pack);
HWY_EXPORT(unpack);

void pack_groups(ResidualStorage storage, const float* values, const Dither* dither,
                 std::int64_t group, std::int64_t count, std::byte* out) {
  HWY_DYNAMIC_DISPATCH(pack)(storage, values, dither, group, count, out);
}

void unpack_groups(ResidualStorage storage, const std::byte* in, std::int64_t count,
                   float* values) {
  HWY_DYNAMIC_DISPATCH(unpack)(storage, in, count, values);
}

}  // namespace thinwire
#endif  // HWY_ONCE
