#include <array>
#include <string_view>

#include "compressors/core/family.h"
#include "compressors/lowrank/lowrank.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 1> kPowerSgdWords = {"powersgd"};
constexpr std::array kPowerSgdOptions = {
    FamilyOption{"rounds", "1 | 2", "2",
                 "2: a whole power iteration a step; 1: half of it, and half the bytes and waits"},
};
constexpr std::array<std::string_view, 1> kGaloreWords = {"galore"};
constexpr std::array kGaloreOptions = {
    FamilyOption{"refresh", "1 to 10000", "200", "steps that a basis is kept"},
};

constexpr std::array<std::string_view, 1> kLowRankWords = {"lowrank"};

// What these send goes on from step to step; without a memory each step would begin at random.
void need_error_feedback(const SpecReader& reader) {
  if (reader.flag("ef", true)) return;
  reader.refuse_value("ef", std::string(reader.family()) + " needs its memory", "on");
}

void make_powersgd(const SpecReader& reader, Codec& codec) {
  const SpecToken& main = reader.needed_main("a rank: powersgd:4", "powersgd:4");
  PowerSgdOptions options;
  options.rank = reader.integer("rank", main, 1, kMaxLowRank);
  options.rounds = reader.integer("rounds", options.rounds, 1, 2);
  need_error_feedback(reader);
  codec.linear = make_powersgd_codec(options);
}

void make_galore(const SpecReader& reader, Codec& codec) {
  const SpecToken& main = reader.needed_main("a rank: galore:4", "galore:4");
  GaloreOptions options;
  options.rank = reader.integer("rank", main, 1, kMaxLowRank);
  options.refresh = reader.integer("refresh", options.refresh, 1, kMaxLowRankRefresh);
  need_error_feedback(reader);
  codec.linear = make_galore_codec(options);
}

void make_lowrank(const SpecReader& reader, Codec& codec) {
  const SpecToken& main = reader.needed_main("a rank: lowrank:4", "lowrank:4");
  codec.payload = make_lowrank_codec(reader.integer("rank", main, 1, kMaxLowRank));
}

}  // namespace

extern constexpr Family kPowerSgdFamily = {
    .name = "powersgd",
    .words = kPowerSgdWords,
    .id = 7,
    .main = "the rank, 1 to 64",
    .sample = "powersgd:4",
    .options = kPowerSgdOptions,
    .paper = "Vogels, Karimireddy, Jaggi, PowerSGD, NeurIPS 2019",
    .use =
        "large matrices at high ratios; rides on the transport's own allreduce. Rank 1 to 4 for "
        "vision, up to 32 for language",
    .make = make_powersgd,
};

extern constexpr Family kGaloreFamily = {
    .name = "galore",
    .words = kGaloreWords,
    .id = 7,
    .main = "the rank, 1 to 64",
    .sample = "galore:4",
    .options = kGaloreOptions,
    .paper = "Zhao et al., GaLore, ICML 2024",
    .use =
        "as powersgd with half its bytes, one wait and less work a step, where the gradients' "
        "subspace changes slowly",
    .make = make_galore,
};

extern constexpr Family kLowRankFamily = {
    .name = "lowrank",
    .words = kLowRankWords,
    .id = 7,
    .main = "the rank, 1 to 64",
    .sample = "lowrank:4",
    .options = {},
    .paper = "Vogels, Karimireddy, Jaggi, PowerSGD, NeurIPS 2019",
    .use =
        "one matrix for a receiver that shares no state: arrays, federated updates; between ranks "
        "powersgd costs less",
    .make = make_lowrank,
};

}  // namespace thinwire
