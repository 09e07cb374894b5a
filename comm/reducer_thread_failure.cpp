// ReducerThread: what it does and says when a step cannot be, or has NaN or Inf in it.
#include <algorithm>

#include "comm/gather.h"
#include "comm/peer_lost.h"
#include "comm/reducer_thread.h"

namespace thinwire {

// What each rank found first, exchanged: one transfer more in a step that ends with an error. Which
// ranks take part goes by the flags, which all ranks have alike.
std::string ReducerThread::first_nonfinite() {
  struct Record {
    std::uint64_t layer;
    std::int64_t index;
    float value;
    std::uint32_t known;  // 0: nothing found, 1: in the sum, 2: in the rank's own values
  };
  Record mine{};
  for (const auto& [layer, found] : found_) {
    const std::uint32_t known = found.own ? 2 : 1;
    if (known > mine.known) {
      mine = {layer, found.index, found.value, known};
    }
  }
  wait_began_ = Clock::now();
  arm();
  const std::vector<Record> all =
      gather<Record>(*comm_, std::span<const Record>(&mine, 1), wait_began_ + options_.deadline);
  std::size_t first = 0;
  for (std::size_t rank = 1; rank < all.size(); ++rank) {
    const Record& a = all[rank];
    const Record& b = all[first];
    if (a.known > b.known || (a.known == b.known && a.layer < b.layer)) {
      first = rank;
    }
  }
  const Record& record = all[first];
  if (record.known == 0 || record.layer >= layers_.size()) {
    return "every rank's own values are finite, their sum is not";
  }
  const std::string where = "tensor '" + layers_[record.layer].name + "', index " +
                            std::to_string(record.index) + ", value " +
                            std::to_string(record.value);
  return record.known == 2 ? "the first: rank " + std::to_string(first) + ", " + where
                           : "the first: " + where + " in the sum over the ranks";
}

// Null when no flagged layer asks for an error. The same text on every rank.
std::exception_ptr ReducerThread::nonfinite_error() {
  std::string names;
  bool wanted = false;
  for (std::size_t i = 0; i < flagged_.size(); ++i) {
    if (flagged_[i] != 0) {
      names += names.empty() ? "'" : ", '";
      names += layers_[i].name;
      names += "'";
      wanted = wanted || plan_->choices[i].codec.options.nonfinite == NonFinite::kError;
    }
  }
  if (!wanted) {
    return nullptr;
  }
  return std::make_exception_ptr(NonFiniteError(
      "NaN or Inf in the gradient of " + names + " at step " + std::to_string(step_) +
      " on at least one rank; expected finite values (nonfinite=error)\n" + first_nonfinite() +
      "\nthe step's residuals are rolled back on every rank\nhint: lower the learning rate or the "
      "loss scale, clip gradients, or use nonfinite=skip-step to leave such steps out"));
}

// Ends the reducer: the step is undone, everything pending and to come gets the error.
void ReducerThread::fail(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const TransportError& transport) {
    error = aborted_ ? std::make_exception_ptr(TransportError(
                           "the reducer was aborted at step " + std::to_string(step_) +
                           "\nhint: make a new reducer over a new group"))
                     : lose_peer(transport);
  } catch (const std::exception& other) {
    // The peers do not know of it; without this rank they cannot go on.
    if (!comm_->traits().survives_failure && options_.report) {
      options_.report("rank " + std::to_string(comm_->rank()) + " ends the job at step " +
                      std::to_string(step_) + ": " + other.what());
    }
    end_group();
  }
  memories_.rollback();
  std::deque<ReductionJob> queued;
  {
    const std::lock_guard lock(mutex_);
    failure_ = error;
    queued.swap(queue_);
  }
  for (ReductionJob& job : queued) {
    active_.emplace_back().job = std::move(job);
  }
  for (ActiveBucket& bucket : active_) {
    if (bucket.layout != nullptr) {
      for (BucketGroup& group : bucket.layout->groups) {
        group.transfer.reset();
      }
    }
    complete(bucket, error);
  }
  active_.clear();
  waiting_for_ = nullptr;
}

std::exception_ptr ReducerThread::lose_peer(const TransportError& error) {
  LossReport report{.rank = comm_->rank(),
                    .world_size = comm_->size(),
                    .step = step_,
                    .waited = Clock::now() - wait_began_,
                    .deadline = options_.deadline,
                    .cause = error.what()};
  if (waiting_for_ != nullptr) {
    for (const BucketLayer& entry : waiting_for_->job.bucket.layers) {
      report.blocked.push_back(layers_[entry.layer].name);
    }
  }
  const PeerLost lost = lost_peer(*comm_, std::move(report), options_.roll_call_grace);
  if (!comm_->traits().survives_failure) {
    if (options_.report) {
      options_.report(lost.what());
    }
    end_group();
  }
  return std::make_exception_ptr(lost);
}

// On the watchdog's thread, while this one hangs in a call of the transport.
void ReducerThread::end_stuck() {
  if (options_.report) {
    options_.report(
        peer_lost({.rank = comm_->rank(),
                   .world_size = comm_->size(),
                   .step = step_,
                   .waited = options_.deadline + options_.roll_call_grace,
                   .deadline = options_.deadline,
                   .cause = "a call of the transport '" + comm_->name() + "' did not return"})
            .what());
  }
  end_group();
}

void ReducerThread::end_group() {
  if (!comm_->traits().survives_failure && options_.end_program) {
    options_.end_program();
  } else {
    comm_->abort();
  }
}

}  // namespace thinwire
