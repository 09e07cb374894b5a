#include <array>
#include <string_view>

#include "compressors/core/family.h"
#include "compressors/fedzip/fedzip.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 1> kWords = {"fedzip"};
constexpr std::array kOptions = {
    FamilyOption{"k", "3 to 256", "3", "clusters of the values, zero's included"},
};

void make(const SpecReader& reader, Codec& codec) {
  const SpecToken& main = reader.needed_main("a density: fedzip:0.01", "fedzip:0.01");
  FedzipOptions options;
  options.density = reader.share("density", main, true, "0.01");
  options.clusters =
      reader.integer("k", options.clusters, kLeastFedzipClusters, kMostFedzipClusters);
  codec.payload = make_fedzip_codec(options);
}

}  // namespace

extern constexpr Family kFedzipFamily = {
    .name = "fedzip",
    .words = kWords,
    .id = 9,
    .main = "the density in (0, 1]",
    .sample = "fedzip:0.01",
    .options = kOptions,
    .paper = "Malekijoo et al., FedZip, arXiv 2102.01593",
    .use = "federated updates: a sparse tensor whose entries take few values",
    .make = make,
};

}  // namespace thinwire
