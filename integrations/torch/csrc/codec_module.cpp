// Extension module thinwire._codec: one codec on plain memory. Needs no torch. Pointers come from
// thinwire/_array.py, which keeps the arrays alive and checks dtype, layout and device.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "comm/forecast.h"
#include "comm/policy.h"
#include "compressors/adaptive/codec_speeds.h"
#include "compressors/core/aligned_buffer.h"
#include "compressors/core/codec.h"
#include "compressors/core/codec_support.h"
#include "compressors/core/payload.h"
#include "compressors/core/simd.h"
#include "compressors/core/spec.h"
#include "compressors/families.h"
#include "integrations/torch/csrc/error_names.h"
#include "integrations/torch/csrc/frame.h"

namespace nb = nanobind;

namespace thinwire {
namespace {

constexpr std::string_view kStream = "array";

class ArrayCodec {
 public:
  explicit ArrayCodec(const std::string& spec) : codec_(make_codec(spec)) {
    if (codec_.linear) {
      throw NotAvailable("codec '" + codec_.spec +
                         "' only means something as the mean over ranks, not for one array"
                         "\nhint: use it in thinwire.torch.compress(), or choose another family");
    }
    if (codec_.payload != nullptr && codec_.payload->memory_needs(1).velocity) {
      throw NotAvailable("codec '" + codec_.spec +
                         "' keeps a velocity from step to step, an array only a residual"
                         "\nhint: leave out momentum, nesterov, clip and clip_norm");
    }
  }

  const std::string& spec() const { return codec_.spec; }

  // Largest frame of an array of this shape, in bytes.
  std::size_t bound(const std::vector<std::int64_t>& shape, std::int64_t n, DType dtype) const {
    return frame_header_bytes({.dtype = dtype, .shape = shape, .spec = codec_.spec}) +
           message_bytes(n, dtype);
  }

  nb::bytes encode(std::uintptr_t data, const std::vector<std::int64_t>& shape, std::uint8_t dtype,
                   std::uint8_t kind, std::uintptr_t residual, const std::string& key,
                   std::uint64_t step) const {
    FrameHeader header{
        .dtype = static_cast<DType>(dtype), .kind = kind, .shape = shape, .spec = codec_.spec};
    std::int64_t n = 1;
    for (const std::int64_t extent : shape) {
      n *= extent;
    }
    std::vector<std::byte> frame(bound(shape, n, header.dtype));
    std::size_t size = 0;
    {
      const nb::gil_scoped_release no_gil;
      write_frame(header, frame);
      const std::size_t begin = frame_header_bytes(header);
      const TensorView grad{reinterpret_cast<void*>(data), n, header.dtype};
      size = begin + encode_message(grad, shape, reinterpret_cast<float*>(residual), key, step,
                                    std::span(frame).subspan(begin));
    }
    return nb::bytes(frame.data(), size);
  }

  void decode(const nb::bytes& bytes, std::size_t message_begin, std::uintptr_t out, std::int64_t n,
              std::uint8_t dtype, const std::string& key, std::uint64_t step) const {
    const std::span frame(static_cast<const std::byte*>(bytes.data()), bytes.size());
    const nb::gil_scoped_release no_gil;
    const auto message = frame.subspan(message_begin);
    const TensorView result{reinterpret_cast<void*>(out), n, static_cast<DType>(dtype)};
    if (codec_.is_none()) {
      if (message.size() != result.bytes()) {
        throw CorruptPayload("frame: expected " + std::to_string(result.bytes()) +
                             " bytes of values, got " + std::to_string(message.size()) +
                             "\nhint: pass the bytes of encode() unchanged");
      }
      std::memcpy(result.data, message.data(), message.size());
      return;
    }
    const PayloadHeader header = open_payload(message, static_cast<std::uint64_t>(n), 0);
    if (header.codec_id != codec_.family_id) {
      throw CorruptPayload("message: expected codec id " + std::to_string(codec_.family_id) +
                           ", got " + std::to_string(header.codec_id) +
                           "\nhint: decode with the codec that encoded");
    }
    // A frame that claims many elements costs no memory before it is refused.
    const auto scratch = AlignedBuffer::uninitialized(codec_.payload->workspace_bytes(n));
    const Context ctx = context(scratch, n, key, step);
    codec_.payload->decode(ctx, message.subspan(kPayloadHeaderBytes), result);
  }

 private:
  std::size_t message_bytes(std::int64_t n, DType dtype) const {
    return codec_.is_none() ? static_cast<std::size_t>(n) * size_bytes(dtype)
                            : kPayloadHeaderBytes + codec_.payload->slot_bytes(n);
  }

  static Context context(const AlignedBuffer& scratch, std::int64_t n, const std::string& key,
                         std::uint64_t step) {
    Context ctx;
    ctx.workspace = scratch.bytes();
    ctx.step = step;
    ctx.key_hash = Key{.stream = kStream, .parameter = key, .begin = 0, .end = n}.hash();
    ctx.parameter = key;
    return ctx;
  }

  // NonFiniteError that names the first NaN or Inf, if there is one.
  static void refuse_nonfinite(TensorView grad, const Memory* memory, const std::string& key) {
    const std::optional<PlacedValue> first = first_nonfinite(grad, memory);
    if (!first) return;
    throw NonFiniteError("x" + (key.empty() ? "" : " '" + key + "'") + ": value " +
                         std::to_string(first->value) + " at index " +
                         std::to_string(first->index) +
                         (memory == nullptr ? "" : " of x + residual") +
                         "; expected finite values (nonfinite=error)\nhint: with "
                         "nonfinite=propagate the array decodes to NaN and the residual stays");
  }

  // Returns the bytes written to `out`; `residual` may be null.
  std::size_t encode_message(TensorView grad, std::span<const std::int64_t> shape, float* residual,
                             const std::string& key, std::uint64_t step,
                             std::span<std::byte> out) const {
    if (codec_.is_none()) {
      if (codec_.options.nonfinite == NonFinite::kError) refuse_nonfinite(grad, nullptr, key);
      std::memcpy(out.data(), grad.data, grad.bytes());
      return grad.bytes();
    }
    const auto n = static_cast<std::size_t>(grad.elements);
    const auto scratch =
        AlignedBuffer::uninitialized(codec_.payload->workspace_bytes(grad.elements));
    Context ctx = context(scratch, grad.elements, key, step);
    ctx.shape = shape;
    const auto body = out.subspan(kPayloadHeaderBytes);
    std::optional<Memory> memory;
    if (residual != nullptr) {
      if (codec_.options.storage != ResidualStorage::kFP32) {
        throw InvalidArgument("encode with a residual of fp32, and memory= of \"" + codec_.spec +
                              "\"\nhint: leave memory= out; it says how a reducer keeps residuals");
      }
      memory.emplace(grad.elements,
                     MemoryOptions{.transactional = false, .decay = codec_.options.decay});
      memory->restore({residual, n});
    }
    const EncodeResult result =
        codec_.payload->encode(ctx, grad, memory ? &*memory : nullptr, body);
    if (result.nonfinite && codec_.options.nonfinite == NonFinite::kError) {
      refuse_nonfinite(grad, memory ? &*memory : nullptr, key);
    }
    if (memory && memory->written()) {
      memory->commit();
      std::memcpy(residual, memory->current().data(), n * sizeof(float));
    }
    const std::size_t size = kPayloadHeaderBytes + result.bytes;
    const PayloadHeader header{
        .codec_id = codec_.family_id,
        .flags = static_cast<std::uint16_t>(result.nonfinite ? kFlagNonFinite : 0),
        .elements = static_cast<std::uint64_t>(n)};
    seal_payload(header, out.first(size));
    return size;
  }

  Codec codec_;
};

nb::tuple parse_frame(const nb::bytes& bytes, std::int64_t max_elements) {
  const FrameHeader header = read_frame(
      std::span(static_cast<const std::byte*>(bytes.data()), bytes.size()), max_elements);
  nb::list shape;
  for (const std::int64_t extent : header.shape) {
    shape.append(extent);
  }
  return nb::make_tuple(static_cast<int>(header.dtype), static_cast<int>(header.kind),
                        nb::tuple(shape), header.spec, header.message_begin, header.elements);
}

nb::list describe_options(std::span<const FamilyOption> options) {
  nb::list all;
  for (const FamilyOption& option : options) {
    all.append(nb::make_tuple(option.name, option.values, option.otherwise, option.what));
  }
  return all;
}

nb::list describe_traits(const Codec& codec) {
  nb::list words;
  if (codec.is_none()) {
    return words;
  }
  const Traits traits = codec.payload ? codec.payload->traits() : codec.linear->traits();
  const std::pair<bool, const char*> all[] = {{codec.linear != nullptr, "linear"},
                                              {traits.lossless, "lossless"},
                                              {traits.sparse, "sparse"},
                                              {traits.exact_sum, "exact sum"},
                                              {traits.unbiased, "unbiased"}};
  for (const auto& [has, word] : all) {
    if (has) {
      words.append(word);
    }
  }
  return words;
}

nb::list describe_families() {
  nb::list all;
  for (const Family* family : families()) {
    nb::dict entry;
    entry["name"] = family->name;
    nb::list words;
    for (const std::string_view word : family->words) {
      words.append(word);
    }
    entry["words"] = words;
    entry["main"] = family->main;
    entry["sample"] = family->sample;
    entry["options"] = describe_options(family->options);
    entry["traits"] = describe_traits(make_codec(family->sample));
    entry["paper"] = family->paper;
    entry["use"] = family->use;
    all.append(entry);
  }
  return all;
}

using FlatGradient = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// What each policy would make of a model's steps. dtypes: as in thinwire/_array.py. gradients:
// none, or one a layer, empty where none is known.
nb::list forecast_policies(const std::vector<std::string>& names,
                           const std::vector<std::vector<std::int64_t>>& shapes,
                           const std::vector<std::uint8_t>& dtypes,
                           const std::vector<FlatGradient>& gradients,
                           const std::vector<std::string>& policies, int ranks,
                           double latency_seconds, double bytes_per_second,
                           double backward_seconds) {
  ForecastJob job{
      .layers = {},
      .ranks = ranks,
      .link = {.latency_seconds = latency_seconds, .bytes_per_second = bytes_per_second},
      .backward_seconds = backward_seconds};
  for (std::size_t i = 0; i < names.size(); ++i) {
    job.layers.push_back({names[i], shapes.at(i), static_cast<DType>(dtypes.at(i))});
  }
  for (const FlatGradient& gradient : gradients) {
    const auto elements = static_cast<std::int64_t>(gradient.size());
    job.gradients.push_back(elements == 0 ? TensorView()
                                          : TensorView{gradient.data(), elements, DType::kF32});
  }
  std::vector<Forecast> forecasts;
  {
    const nb::gil_scoped_release no_gil;
    CodecSpeeds speeds(CodecSpeeds::user_cache());
    for (const std::string& policy : policies) {
      forecasts.push_back(forecast(job, Policy::parse(policy), speeds));
    }
  }
  nb::list all;
  for (const Forecast& one : forecasts) {
    nb::list layers;
    for (std::size_t i = 0; i < job.layers.size(); ++i) {
      nb::dict layer;
      layer["name"] = job.layers[i].name;
      layer["elements"] = job.layers[i].elements();
      layer["codec"] = one.plan.choices[i].codec.spec;
      layer["reason"] = one.plan.choices[i].reason;
      layer["seconds"] = one.layer_seconds[i];
      layer["sent_bytes"] = one.layer_sent[i];
      layers.append(layer);
    }
    nb::dict entry;
    entry["exposed_seconds"] = one.exposed;
    entry["work_seconds"] = one.work;
    entry["sent_bytes"] = one.sent;
    entry["layers"] = layers;
    all.append(entry);
  }
  return all;
}

// [(spec, encode, decode, each further body)], seconds an element on one core of this machine.
nb::list codec_speeds(const std::vector<std::string>& specs) {
  std::vector<Codec> codecs;
  for (const std::string& spec : specs) codecs.push_back(make_codec(spec));
  CodecSpeeds speeds(CodecSpeeds::user_cache());
  {
    const nb::gil_scoped_release no_gil;
    speeds.measure(codecs);
  }
  nb::list all;
  for (const Codec& codec : codecs) {
    const CodecSpeed& speed = speeds.of(codec.spec);
    all.append(nb::make_tuple(codec.spec, speed.encode, speed.decode, speed.decode_more));
  }
  return all;
}

void translate(const std::exception_ptr& error, void* /*unused*/) {
  try {
    std::rethrow_exception(error);
  } catch (const Error& e) {
    const nb::object type = nb::module_::import_("thinwire.errors").attr(python_class_of(e));
    PyErr_SetString(type.ptr(), e.what());
  }
}

}  // namespace
}  // namespace thinwire

NB_MODULE(_codec, m) {
  using thinwire::ArrayCodec;
  nb::register_exception_translator(&thinwire::translate);
  nb::class_<ArrayCodec>(m, "ArrayCodec")
      .def(nb::init<const std::string&>())
      .def_prop_ro("spec", &ArrayCodec::spec)
      .def("encode", &ArrayCodec::encode)
      .def("decode", &ArrayCodec::decode);
  m.def("parse_frame", &thinwire::parse_frame);
  m.def("families", &thinwire::describe_families);
  m.def("common_options", [] { return thinwire::describe_options(thinwire::common_options()); });
  m.def("forecast", &thinwire::forecast_policies);
  m.def("codec_speeds", &thinwire::codec_speeds);
  m.def("simd_targets", &thinwire::simd_targets);
  m.def("check_policy",
        [](const std::string& text) { return thinwire::Policy::parse(text).text(); });
}
