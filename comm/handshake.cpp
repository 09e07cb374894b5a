#include "comm/handshake.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <span>

#include "comm/gather.h"

namespace thinwire {
namespace {

// What a damaged hello may make us allocate a rank.
constexpr std::uint64_t kMostTextBytes = std::uint64_t{16} << 20;

constexpr std::size_t kFieldsShown = 8;

// Fixed for all versions: what follows may change, this block may not.
struct Hello {
  std::uint64_t text_bytes = 0;
  std::uint64_t text_hash = 0;
};

std::string serialise(const std::vector<HandshakeField>& fields) {
  std::string text;
  for (const HandshakeField& field : fields) {
    text += field.name;
    text += '\0';
    text += field.value;
    text += '\0';
  }
  return text;
}

std::vector<HandshakeField> parse(std::string_view text) {
  std::vector<HandshakeField> fields;
  const auto take = [&text] {
    const std::size_t end = std::min(text.find('\0'), text.size());
    std::string word(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
    return word;
  };
  while (!text.empty()) {
    std::string name = take();
    if (name.empty()) {
      break;  // no field of ours: what follows is damaged
    }
    fields.push_back({std::move(name), take()});
  }
  return fields;
}

std::string ranks_text(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    text += i == 0 ? "" : ", ";
    text += std::to_string(ranks[i]);
  }
  return text;
}

// "  policy:\n    ranks 0, 1: topk:0.01\n    rank 2: q8\n", or nothing when all agree.
std::string describe(const std::string& name, const std::vector<std::string>& values) {
  if (std::all_of(values.begin(), values.end(),
                  [&](const std::string& value) { return value == values[0]; })) {
    return {};
  }
  std::vector<std::pair<std::string, std::vector<int>>> holders;
  for (std::size_t rank = 0; rank < values.size(); ++rank) {
    auto holder = std::find_if(holders.begin(), holders.end(),
                               [&](const auto& h) { return h.first == values[rank]; });
    if (holder == holders.end()) {
      holder = holders.insert(holders.end(), {values[rank], {}});
    }
    holder->second.push_back(static_cast<int>(rank));
  }
  std::string text = "\n  ";
  text += name;
  text += ':';
  for (const auto& [value, ranks] : holders) {
    text += "\n    ";
    text += ranks_text(ranks);
    text += ": ";
    text += value;
  }
  return text;
}

[[noreturn]] void refuse(const std::vector<std::vector<HandshakeField>>& all) {
  // By name, in the order of rank 0's fields, then what only others have.
  std::vector<std::string> names;
  std::set<std::string> seen;
  std::vector<std::map<std::string, std::string>> values(all.size());
  for (std::size_t rank = 0; rank < all.size(); ++rank) {
    for (const HandshakeField& field : all[rank]) {
      values[rank].emplace(field.name, field.value);
      if (seen.insert(field.name).second) {
        names.push_back(field.name);
      }
    }
  }
  std::string text = "the ranks do not agree on what to reduce:";
  std::size_t shown = 0;
  for (const std::string& name : names) {
    std::vector<std::string> row;
    for (const auto& of_rank : values) {
      const auto found = of_rank.find(name);
      row.push_back(found == of_rank.end() ? "(none)" : found->second);
    }
    const std::string line = describe(name, row);
    if (line.empty()) {
      continue;
    }
    if (shown++ == kFieldsShown) {
      text += "\n  ...";
      break;
    }
    text += line;
  }
  throw MismatchError(text +
                      "\nhint: start every rank with the same thinwire version, the same policy "
                      "(THINWIRE_POLICY may differ between hosts) and the same model");
}

}  // namespace

void shake_hands(Communicator& comm, const std::vector<HandshakeField>& fields, Deadline deadline) {
  const std::string text = serialise(fields);
  const Hello mine{text.size(), XXH3_64bits(text.data(), text.size())};
  const std::vector<Hello> hellos = gather(comm, std::span(&mine, 1), deadline);
  std::uint64_t longest = 0;
  bool equal = true;
  for (const Hello& hello : hellos) {
    longest = std::max(longest, hello.text_bytes);
    equal = equal && hello.text_bytes == mine.text_bytes && hello.text_hash == mine.text_hash;
  }
  if (equal) {
    return;
  }
  if (longest > kMostTextBytes) {
    throw CorruptPayload("handshake: a rank announces " + std::to_string(longest) +
                         " bytes of policy and layer table, expected at most " +
                         std::to_string(kMostTextBytes));
  }
  // Some pair differs, so every rank sees it and comes here.
  std::vector<char> padded(longest);
  std::copy(text.begin(), text.end(), padded.begin());
  const std::vector<char> texts = gather(comm, std::span<const char>(padded), deadline);
  std::vector<std::vector<HandshakeField>> all;
  for (std::size_t rank = 0; rank < hellos.size(); ++rank) {
    all.push_back(parse({texts.data() + rank * longest, hellos[rank].text_bytes}));
  }
  refuse(all);
}

}  // namespace thinwire
