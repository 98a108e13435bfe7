// What both kernels need: element types and their conversions, vectors of the machine's width, memory, threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define VISIONTOK_EXPORT extern "C" __attribute__((visibility("default")))

namespace visiontok {

// Codes of dtypes, as the launcher passes them.
enum Dtype : int32_t { kFloat = 0, kBfloat = 1, kHalf = 2 };

struct bfloat {
  uint16_t bits;
};

struct half {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Conversions are selections without branches, so that loops over channels become vector code on every compiler.

inline float widen(float value) { return value; }

inline float widen(bfloat value) { return float_of(uint32_t{value.bits} << 16); }

inline float widen(half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, magnitude = value.bits & 0x7fffu;
  // The exponent's bias differs by 112; that of infinities and NaN moves twice as far, to the top.
  const uint32_t shift = magnitude < 0x7c00u ? 0x38000000u : 0x70000000u;
  const uint32_t normal = (magnitude << 13) + shift;
  // Through an integer rather than a denormal float, which a process may flush to zero.
  const uint32_t tiny = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x0400u ? tiny : normal));
}

inline void narrow(float value, float& to) { to = value; }

inline void narrow(float value, bfloat& to) {
  const uint32_t bits = bits_of(value);
  const uint32_t nearest_even = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>(nan ? 0x7fc0u : nearest_even >> 16);
}

inline void narrow(float value, half& to) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Between 0.5 and 1 floats are as far apart as the smallest halves: the addition rounds.
  const uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t rounded = magnitude < 0x38800000u ? tiny : normal;
  rounded = magnitude >= 0x477ff000u ? 0x7c00u : rounded;
  rounded = magnitude > 0x7f800000u ? 0x7e00u : rounded;
  to.bits = static_cast<uint16_t>(sign | rounded);
}

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));

inline Vector read(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline void write(float* to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

// Sum of term(row[0]) ... term(row[count - 1]) in a fixed order; term takes vectors and floats.
template <class Term>
inline float sum_of(const float* row, int64_t count, Term term) {
  // Several sums, because each addition waits for the one before.
  Vector sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) sums[part] += term(read(row + i + part * kLanes));
  }
  for (; i + kLanes <= count; i += kLanes) sums[0] += term(read(row + i));
  const Vector lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  for (; i < count; ++i) total += term(row[i]);
  return total;
}

// Cuts a block of memory into aligned pieces.
class Pieces {
 public:
  explicit Pieces(void* begin) : next_(static_cast<char*>(begin)) {}

  template <class T>
  static size_t bytes(int64_t count) {
    return round_up(static_cast<size_t>(count) * sizeof(T));
  }

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return piece;
  }

 protected:
  static constexpr size_t kAlign = 64;
  static size_t round_up(size_t size) { return (size + kAlign - 1) / kAlign * kAlign; }

 private:
  char* next_;
};

// A block of memory of its own. Nothing here throws: exceptions must not cross the C interface.
class Workspace : public Pieces {
 public:
  explicit Workspace(size_t bytes) : Workspace(std::malloc(bytes + kAlign)) {}
  ~Workspace() { std::free(block_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  explicit operator bool() const { return block_ != nullptr; }

 private:
  explicit Workspace(void* block) : Pieces(aligned(block)), block_(block) {}
  static void* aligned(void* block) { return reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(block))); }

  void* block_;
};

// Runs part(0) ... part(threads - 1). One thread makes no parallel region: a region inside it would start new threads.
template <class Part>
inline void split(int32_t threads, Part part) {
  if (threads == 1) return part(0);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int32_t i = 0; i < threads; ++i) part(i);
}

// Where part i of `parts` begins among `count` pieces of work.
inline int64_t share(int64_t count, int64_t i, int64_t parts) { return count * i / parts; }

}  // namespace visiontok
