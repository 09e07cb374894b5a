#include "comm/peer_lost.h"

#include <cstdio>

namespace thinwire {
namespace {

constexpr std::size_t kLayersShown = 3;

std::string seconds(std::chrono::duration<double> time) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", time.count());
  return text;
}

std::string rank_list(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) {
    text += text.empty() ? "" : ", ";
    text += std::to_string(rank);
  }
  return text;
}

std::string layer_list(const std::vector<std::string>& layers) {
  std::string text;
  for (std::size_t i = 0; i < layers.size() && i < kLayersShown; ++i) {
    text += i == 0 ? "'" : ", '";
    text += layers[i];
    text += "'";
  }
  if (layers.size() > kLayersShown) {
    text += " and " + std::to_string(layers.size() - kLayersShown) + " more";
  }
  return text;
}

std::string hint(const LossReport& report) {
  if (static_cast<int>(report.absent.size()) == report.world_size - 1) {
    return "no other rank answers: look at this host's network and at the other ranks' logs";
  }
  return report.absent.empty()
             ? "look for the rank that ended or hangs; restart the job from the last checkpoint"
             : "look at the log of rank " + std::to_string(report.absent.front()) +
                   "; if it was only slow, raise the deadline; restart the job from the last "
                   "checkpoint";
}

}  // namespace

PeerLost peer_lost(const LossReport& report) {
  std::string text;
  if (report.absent.empty()) {
    text = "lost a peer at step ";
  } else {
    text = report.absent.size() == 1 ? "no answer from rank " : "no answer from ranks ";
    text += rank_list(report.absent) + " at step ";
  }
  text += std::to_string(report.step) + "; this rank (" + std::to_string(report.rank) + " of " +
          std::to_string(report.world_size) + ") waited " + seconds(report.waited) + " (deadline " +
          seconds(report.deadline) + ")";
  if (!report.blocked.empty()) {
    text += " for " + layer_list(report.blocked);
  }
  text += "\n" + report.cause;
  text += "\nthe step is undone on this rank: its residuals are those of the last finished step";
  text += "\nhint: " + hint(report);
  return PeerLost(text, report.absent, report.step);
}

PeerLost lost_peer(Communicator& comm, LossReport report, std::chrono::milliseconds grace) {
  if (comm.traits().survives_failure) {
    comm.abort();
  }
  try {
    report.absent = comm.roll_call(grace);
  } catch (const std::exception&) {
    report.absent.clear();
  }
  return peer_lost(report);
}

}  // namespace thinwire
