// A whole merge: residual, weighted reduction of each slot, sizes, rows that follow, and the layer norm.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "support.hpp"

namespace visiontok {
namespace {

// Codes of modes, as the launcher passes them.
enum Mode : int32_t { kMean = 0, kSum = 1, kAmax = 2, kAbsmax = 3, kMlerp = 4 };

// Smallest positive normal number: divides a zero by something.
constexpr float kTiny = 0x1p-126f;

struct Merge {
  int32_t mode;
  const void *x, *y;  // y may be null
  int64_t x_image, x_token, y_image, y_token;
  const float *gamma, *weight, *size;  // null: ones
  const int32_t *csr, *src;
  int64_t length, slots, channels;
  const float* rows;
  int64_t width;
  void* out;
  float *out_size, *out_rows;
  void* normed;  // null: no norm
  const float *norm_weight, *norm_bias;
  float eps;
};

// One token as fp32: x + gamma * y.
template <class T>
void read_token(const Merge& m, int64_t image, int64_t token, float* __restrict row) {
  const T* x = static_cast<const T*>(m.x) + image * m.x_image + token * m.x_token;
  if (m.y == nullptr) {
    for (int64_t c = 0; c < m.channels; ++c) row[c] = widen(x[c]);
    return;
  }
  const T* y = static_cast<const T*>(m.y) + image * m.y_image + token * m.y_token;
  if (m.gamma == nullptr) {
    for (int64_t c = 0; c < m.channels; ++c) row[c] = widen(x[c]) + widen(y[c]);
  } else {
    const float* __restrict gamma = m.gamma;
    for (int64_t c = 0; c < m.channels; ++c) row[c] = widen(x[c]) + gamma[c] * widen(y[c]);
  }
}

void scale(float* row, int64_t count, float factor) {
  for (int64_t c = 0; c < count; ++c) row[c] *= factor;
}

// Folds one more token into a slot's row.
void fold(int32_t mode, float* __restrict row, const float* __restrict token, int64_t count, float factor) {
  // NaN wins, as in torch.
  if (mode == kAmax) {
    for (int64_t c = 0; c < count; ++c) row[c] = token[c] > row[c] || token[c] != token[c] ? token[c] : row[c];
  } else if (mode == kAbsmax) {
    for (int64_t c = 0; c < count; ++c) {
      const float one = std::fabs(token[c]), other = std::fabs(row[c]);
      // Of two opposite values the positive one.
      const bool taken = one > other || one != one || (one == other && token[c] > row[c]);
      row[c] = taken ? token[c] : row[c];
    }
  } else {
    for (int64_t c = 0; c < count; ++c) row[c] += factor * token[c];
  }
}

float length_of(const float* row, int64_t count) {
  return std::sqrt(sum_of(row, count, [](auto value) { return value * value; }));
}

// The members of one slot and what they weigh.
struct Members {
  const int32_t* token;
  int64_t count;
  const float* weight;  // of the image's tokens, null: ones
  float total;

  float of(int64_t i) const { return weight ? weight[token[i]] : 1.0f; }
  // Formed before it multiplies, so that a token alone is copied exactly; padding has size 0 and gives 0.
  float share(int64_t i) const { return of(i) / std::max(total, kTiny); }
};

template <class T>
void reduce(const Merge& m, int64_t image, const Members& members, float* row, float* token) {
  const bool weighted = m.mode == kMean || m.mode == kSum || m.mode == kMlerp;
  float longest = 0;
  if (members.count == 0) std::fill(row, row + m.channels, 0.0f);
  for (int64_t i = 0; i < members.count; ++i) {
    const float factor = m.mode == kSum ? members.of(i) : members.share(i);
    float* to = i == 0 ? row : token;
    read_token<T>(m, image, members.token[i], to);
    if (m.mode == kMlerp) longest = std::max(longest, length_of(to, m.channels));
    if (i > 0) {
      fold(m.mode, row, token, m.channels, factor);
    } else if (weighted && factor != 1.0f) {
      scale(row, m.channels, factor);
    }
  }
  if (m.mode == kMlerp && members.count > 1)
    scale(row, m.channels, longest / std::max(length_of(row, m.channels), kTiny));
}

void move_rows(const Merge& m, int64_t image, const Members& members, float* __restrict to) {
  std::fill(to, to + m.width, 0.0f);
  for (int64_t i = 0; i < members.count; ++i) {
    const float* from = m.rows + (image * m.length + members.token[i]) * m.width;
    const float share = members.share(i);
    for (int64_t c = 0; c < m.width; ++c) to[c] += share * from[c];
  }
}

template <class T>
void layer_norm(const Merge& m, const float* __restrict row, T* __restrict to) {
  const int64_t count = m.channels;
  const float mean = sum_of(row, count, [](auto value) { return value; }) / static_cast<float>(count);
  const auto square = [mean](auto value) { return (value - mean) * (value - mean); };
  const float scale = 1.0f / std::sqrt(sum_of(row, count, square) / static_cast<float>(count) + m.eps);
  const float *__restrict weight = m.norm_weight, *__restrict bias = m.norm_bias;
  if (weight && bias) {
    for (int64_t c = 0; c < count; ++c) narrow((row[c] - mean) * scale * weight[c] + bias[c], to[c]);
  } else {
    for (int64_t c = 0; c < count; ++c) {
      const float value = (row[c] - mean) * scale * (weight ? weight[c] : 1.0f);
      narrow(bias ? value + bias[c] : value, to[c]);
    }
  }
}

template <class T>
void merge_slot(const Merge& m, int64_t image, int64_t slot, float* row, float* token) {
  const int32_t* csr = m.csr + image * (m.slots + 1) + slot;
  const int64_t at = image * m.slots + slot, start = image * m.length;
  const float *size = m.size ? m.size + start : nullptr, *weight = m.weight ? m.weight + start : size;
  Members members{m.src + start + csr[0], csr[1] - csr[0], weight, 0};
  float mass = 0;
  for (int64_t i = 0; i < members.count; ++i) {
    members.total += members.of(i);
    mass += size ? size[members.token[i]] : 1.0f;
  }
  m.out_size[at] = mass;
  T* out = static_cast<T*>(m.out) + at * m.channels;
  // In fp32 the result is made in its place.
  constexpr bool in_place = std::is_same_v<T, float>;
  if constexpr (in_place) row = out;
  if (members.count == 1 && m.y == nullptr && (m.mode == kSum ? members.of(0) : members.share(0)) == 1.0f) {
    const T* x = static_cast<const T*>(m.x) + image * m.x_image + members.token[0] * m.x_token;
    std::copy(x, x + m.channels, out);
  } else {
    reduce<T>(m, image, members, row, token);
    if constexpr (!in_place) {
      for (int64_t c = 0; c < m.channels; ++c) narrow(row[c], out[c]);
    }
  }
  if (m.rows) move_rows(m, image, members, m.out_rows + at * m.width);
  if (m.normed == nullptr) return;
  if constexpr (!in_place) {
    // The norm sees the values as rounded to the dtype.
    for (int64_t c = 0; c < m.channels; ++c) row[c] = widen(out[c]);
  }
  layer_norm<T>(m, row, static_cast<T*>(m.normed) + at * m.channels);
}

template <class T>
void merge_slots(const Merge& m, int64_t first, int64_t last, float* row, float* token) {
  for (int64_t at = first; at < last; ++at) merge_slot<T>(m, at / m.slots, at % m.slots, row, token);
}

template <class T>
void widen_all(const void* from, int64_t count, float* to) {
  for (int64_t c = 0; c < count; ++c) to[c] = widen(static_cast<const T*>(from)[c]);
}

// A vector of parameters in fp32, or null.
const float* parameter(const void* from, int32_t dtype, int64_t count, float* to) {
  if (from == nullptr || dtype == kFloat) return static_cast<const float*>(from);
  if (dtype == kBfloat) {
    widen_all<bfloat>(from, count, to);
  } else {
    widen_all<half>(from, count, to);
  }
  return to;
}

}  // namespace
}  // namespace visiontok

// Returns 0, or 1 without memory.
VISIONTOK_EXPORT int visiontok_merge(int32_t dtype, int32_t mode, const void* x, int64_t x_image, int64_t x_token,
                               const void* y, int64_t y_image, int64_t y_token, const void* gamma, int32_t gamma_dtype,
                               const float* weight, const float* size, const int32_t* csr, const int32_t* src,
                               int64_t batch, int64_t length, int64_t slots, int64_t channels, const float* rows,
                               int64_t width, void* out, float* out_size, float* out_rows, void* normed,
                               const void* norm_weight, int32_t norm_weight_dtype, const void* norm_bias,
                               int32_t norm_bias_dtype, double eps, int32_t threads) {
  using namespace visiontok;
  const size_t vector = Pieces::bytes<float>(channels);
  Workspace space(vector * (3 + 2 * static_cast<size_t>(threads)));
  if (!space) return 1;
  float *gammas = space.take<float>(channels), *weights = space.take<float>(channels),
        *biases = space.take<float>(channels);
  char* scratch = space.take<char>(0);
  const Merge m{mode, x, y, x_image, x_token, y_image, y_token,
                parameter(gamma, gamma_dtype, channels, gammas), weight, size, csr, src, length, slots, channels,
                rows, width, out, out_size, out_rows, normed,
                parameter(norm_weight, norm_weight_dtype, channels, weights),
                parameter(norm_bias, norm_bias_dtype, channels, biases), static_cast<float>(eps)};
  split(threads, [&](int32_t part) {
    Pieces own(scratch + 2 * vector * static_cast<size_t>(part));
    float *row = own.take<float>(channels), *token = own.take<float>(channels);
    const int64_t total = batch * slots, first = share(total, part, threads), last = share(total, part + 1, threads);
    switch (dtype) {
      case kFloat: return merge_slots<float>(m, first, last, row, token);
      case kBfloat: return merge_slots<bfloat>(m, first, last, row, token);
      default: return merge_slots<half>(m, first, last, row, token);
    }
  });
  return 0;
}
