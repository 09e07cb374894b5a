#include "compressors/core/packed_residual.h"

#include <algorithm>
#include <array>

#include "compressors/core/error.h"
#include "compressors/core/huge_pages.h"
#include "compressors/core/packed_residual_kernels.h"

namespace thinwire {
namespace {

std::int64_t groups(std::int64_t elements) { return (elements + kPackedGroup - 1) / kPackedGroup; }

}  // namespace

PackedResidual::PackedResidual(ResidualStorage storage, std::int64_t elements)
    : storage_(storage), elements_(elements), data_(allocate_pages(bytes())) {}

std::size_t PackedResidual::bytes() const {
  return static_cast<std::size_t>(groups(elements_) * packed_group_bytes(storage_));
}

void PackedResidual::write(std::span<const float> values, const Dither* dither) {
  const std::int64_t whole = elements_ / kPackedGroup;
  std::byte* end = data_.get() + whole * packed_group_bytes(storage_);
  pack_groups(storage_, values.data(), dither, 0, whole, data_.get());
  if (whole == groups(elements_)) return;
  std::array<float, kPackedGroup> last{};
  std::copy(values.begin() + whole * kPackedGroup, values.end(), last.begin());
  pack_groups(storage_, last.data(), dither, whole, 1, end);
}

void PackedResidual::read(std::span<float> values) const {
  const std::int64_t whole = elements_ / kPackedGroup;
  unpack_groups(storage_, data_.get(), whole, values.data());
  if (whole == groups(elements_)) return;
  std::array<float, kPackedGroup> last;
  unpack_groups(storage_, data_.get() + whole * packed_group_bytes(storage_), 1, last.data());
  std::copy_n(last.begin(), elements_ - whole * kPackedGroup,
              values.begin() + whole * kPackedGroup);
}

std::span<BF16> PackedResidual::bf16() const {
  if (storage_ != ResidualStorage::kBF16) {
    throw InvalidArgument("residual seen as bf16 while it is stored in blocks of 8 bits");
  }
  return {reinterpret_cast<BF16*>(data_.get()), static_cast<std::size_t>(elements_)};
}

}  // namespace thinwire
