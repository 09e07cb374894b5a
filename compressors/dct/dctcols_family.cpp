#include <array>
#include <string_view>

#include "compressors/core/family.h"
#include "compressors/dct/dctcols.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 1> kWords = {"dctcols"};
constexpr std::array kOptions = {
    FamilyOption{"refresh", "1 to 10000", "1", "steps for which the chosen columns are kept"},
};

void make(const SpecReader& reader, Codec& codec) {
  const SpecToken& main = reader.needed_main("columns: dctcols:32", "dctcols:32");
  DctColsOptions options;
  options.rank = reader.integer("columns", main, 1, kMaxDctColsRank);
  options.refresh = reader.integer("refresh", options.refresh, 1, kMaxDctColsRefresh);
  if (options.refresh > 1 && !reader.flag("ef", true)) {
    reader.refuse_value("ef", "dctcols keeps its columns in its memory", "on");
  }
  codec.linear = make_dctcols_codec(options);
}

}  // namespace

extern constexpr Family kDctColsFamily = {
    .name = "dctcols",
    .words = kWords,
    .id = 11,
    .main = "columns sent of a matrix, 1 to 65536",
    .sample = "dctcols:32",
    .options = kOptions,
    .paper = "Modoranu et al., SVD-Free Low-Rank Adaptive Gradient Optimization, arXiv 2505.17967",
    .use = "low rank at the cost of two passes over the gradient and a cosine transform",
    .make = make,
};

}  // namespace thinwire
