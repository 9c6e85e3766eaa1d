// A thread's own memory for what a call needs on the way: kept from one call to the next, so that a small call allocates nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace attnreg::cpu {
namespace {

class Scratch {
 public:
  // What is taken lasts until the next call of this.
  static Scratch& begin() {
    static thread_local Scratch scratch;
    scratch.clear();
    return scratch;
  }

  // Holds anything, aligned to a line of the cache.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes((static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + 64));
  }

  // What is taken after a mark lasts until its taker goes back to it.
  struct Mark {
    size_t used, wanted;
    void* spilled;
  };
  Mark mark() const { return {used_, wanted_, spilled_}; }
  void back_to(const Mark& mark) {
    free_spilled(mark.spilled);
    most_wanted_ = wanted_ > most_wanted_ ? wanted_ : most_wanted_;
    used_ = mark.used;
    wanted_ = mark.wanted;
  }

  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  // A block that did not fit in when it was asked for.
  struct Spill {
    Spill* next;
  };
  // More than this is given back when the next call begins. AddressSanitizer sees the ends of blocks that are their own alone.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kKept = 0;
#else
  static constexpr size_t kKept = size_t{32} << 20;
#endif

  Scratch() = default;
  ~Scratch() {
    clear();
    free(memory_);
  }

  void* bytes(size_t size) {
    wanted_ += size;
    if (used_ + size <= size_) {
      used_ += size;
      return static_cast<char*>(memory_) + used_ - size;
    }
    void* const block = aligned_alloc(64, size + 64);
    if (block == nullptr) throw std::bad_alloc();
    Spill* const spill = static_cast<Spill*>(block);
    spill->next = spilled_;
    spilled_ = spill;
    return static_cast<char*>(block) + 64;
  }

  void clear() {
    back_to({0, 0, nullptr});
    if (most_wanted_ > size_ && most_wanted_ <= kKept) {
      free(memory_);
      memory_ = aligned_alloc(64, most_wanted_);
      size_ = memory_ == nullptr ? 0 : most_wanted_;
    }
    most_wanted_ = 0;
  }

  // All but those up to this one.
  void free_spilled(const void* until) {
    while (spilled_ != until) {
      Spill* const next = spilled_->next;
      free(spilled_);
      spilled_ = next;
    }
  }

  void* memory_ = nullptr;
  size_t size_ = 0, used_ = 0, wanted_ = 0, most_wanted_ = 0;
  Spill* spilled_ = nullptr;
};

}  // namespace
}  // namespace attnreg::cpu
