// CodecSpeeds: what codecs cost on this machine, seconds an element on one core. Measured once a
// machine and kept in the user's cache folder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "compressors/core/spec.h"

namespace thinwire {

// Seconds an element of the layer.
struct CodecSpeed {
  double encode = 0;       // with error feedback; of a linear codec: all projections of a step
  double decode = 0;       // one body into a tensor; of a linear codec: all absorbs
  double decode_more = 0;  // each further body, accumulated; of a linear codec 0

  friend bool operator==(const CodecSpeed&, const CodecSpeed&) = default;
};

// Times the codec on a gradient of noise that leaves the nearest caches: the least of a few calls.
// "none": copying the gradient out and back. Takes some milliseconds.
CodecSpeed measure_speed(const Codec& codec);

// By canonical spec. Not thread-safe.
class CodecSpeeds {
 public:
  // What the cache holds of this machine and this version; empty where it holds nothing, cannot be
  // read, or `path` is empty.
  explicit CodecSpeeds(std::string path);
  // The user's cache: $XDG_CACHE_HOME or ~/.cache, thinwire/codec-speeds; empty without either.
  static std::string user_cache();

  // Measures what is not known yet and, if anything was, writes the cache; another process that
  // does the same loses nothing but its time. A cache that cannot be written is no error.
  void measure(std::span<const Codec> codecs);
  // InvalidArgument for one that was not measured.
  const CodecSpeed& of(std::string_view spec) const;
  void set(const std::string& spec, const CodecSpeed& speed) { speeds_[spec] = speed; }

 private:
  void read();
  void write() const;

  std::string path_;
  std::map<std::string, CodecSpeed, std::less<>> speeds_;
};

}  // namespace thinwire
