// Bipartite matching: keys to slots. Similarities live in registers, only each row's best is kept.

#include <algorithm>
#include <cmath>
#include <limits>

#include "support.hpp"

namespace visiontok {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Below this length a vector has no direction; as in the torch formulation.
constexpr float kTiny = 1e-12f;

// A tile of similarities fills the registers: rows times vectors of sums, and one vector per column block.
constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif
constexpr int kColumns = kWide * kLanes;
static_assert(kRows <= kColumns, "a thread's rows hold either tile");
// Rows of b that stay in the second-level cache while all rows of a pass by.
constexpr int64_t kPanelBytes = 128 * 1024;

int64_t tiles(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

// Positions of a set: every second one.
struct Positions {
  int64_t first, count;
  int64_t at(int64_t i) const { return first + 2 * i; }
};

struct Keys {
  const void* data;
  int32_t dtype;
  int64_t heads, depth, stride_image, stride_head, stride_token;
};

// The buffers of one image.
struct Image {
  float* a;          // (row tiles, depth, kRows) unit rows, transposed by tile
  float* b;          // (column tiles, depth, kColumns) likewise
  float* best;       // (row tiles x kRows, kLanes) largest similarity per lane
  int32_t* where;    // same shape, the column block it came from
  float* score;      // (Na,) largest similarity of each token of a
  int32_t* partner;  // (Na,) the token of b it belongs to
  float* edge;       // (2 x kColumns) added to a tile: zeros, and minus infinity beyond the last column

  static size_t bytes(int64_t na, int64_t nb, int64_t depth) {
    const int64_t rows = tiles(na, kRows) * kRows, columns = tiles(nb, kColumns) * kColumns;
    return Pieces::bytes<float>(rows * depth) + Pieces::bytes<float>(columns * depth) +
           Pieces::bytes<float>(rows * kLanes) + Pieces::bytes<int32_t>(rows * kLanes) +
           Pieces::bytes<float>(na) + Pieces::bytes<int32_t>(na) + Pieces::bytes<float>(2 * kColumns);
  }

  Image(Pieces& space, int64_t na, int64_t nb, int64_t depth) {
    const int64_t rows = tiles(na, kRows) * kRows, columns = tiles(nb, kColumns) * kColumns;
    a = space.take<float>(rows * depth);
    b = space.take<float>(columns * depth);
    best = space.take<float>(rows * kLanes);
    where = space.take<int32_t>(rows * kLanes);
    score = space.take<float>(na);
    partner = space.take<int32_t>(na);
    edge = space.take<float>(2 * kColumns);
    const int64_t last = nb - (tiles(nb, kColumns) - 1) * kColumns;
    for (int64_t column = 0; column < kColumns; ++column) {
      edge[column] = 0;
      edge[kColumns + column] = column < last ? 0 : -kInfinity;
    }
  }
};

// Adds `count` heads in one pass over the row.
template <int count, class T>
const T* add_heads(const T* __restrict key, int64_t stride, int64_t depth, float* __restrict row) {
  for (int64_t d = 0; d < depth; ++d) {
    float sum = row[d];
#pragma GCC unroll 4
    for (int head = 0; head < count; ++head) sum += widen(key[head * stride + d]);
    row[d] = sum;
  }
  return key + count * stride;
}

// The sum over heads of one token's key.
template <class T>
void sum_heads(const Keys& keys, int64_t image, int64_t token, float* row) {
  const T* key = static_cast<const T*>(keys.data) + image * keys.stride_image + token * keys.stride_token;
  std::fill(row, row + keys.depth, 0.0f);
  int64_t left = keys.heads;
  for (; left >= 4; left -= 4) key = add_heads<4>(key, keys.stride_head, keys.depth, row);
  for (; left >= 2; left -= 2) key = add_heads<2>(key, keys.stride_head, keys.depth, row);
  if (left > 0) add_heads<1>(key, keys.stride_head, keys.depth, row);
}

void sum_heads(const Keys& keys, int64_t image, int64_t token, float* row) {
  switch (keys.dtype) {
    case kFloat: return sum_heads<float>(keys, image, token, row);
    case kBfloat: return sum_heads<bfloat>(keys, image, token, row);
    default: return sum_heads<half>(keys, image, token, row);
  }
}

// Unit rows of one tile side by side: (depth, width), which the inner loop reads front to back. Each step is taken for
// all rows of the tile before the next, because the steps of one row wait for one another.
template <int width>
void fill_tile(const Keys& keys, int64_t image, const Positions& set, int64_t tile, float* rows, float* __restrict to) {
  const int64_t depth = keys.depth, first = tile * width, filled = std::min<int64_t>(set.count - first, width);
  std::fill(rows + filled * depth, rows + width * depth, 0.0f);
  for (int64_t i = 0; i < filled; ++i) sum_heads(keys, image, set.at(first + i), rows + i * depth);
  float lengths[width];
  const auto square = [](auto value) { return value * value; };
  for (int64_t i = 0; i < width; ++i) lengths[i] = sum_of(rows + i * depth, depth, square);
  // A zero key stays zero.
  for (int64_t i = 0; i < width; ++i) lengths[i] = std::max(std::sqrt(lengths[i]), kTiny);
  for (int64_t i = 0; i < width; ++i) {
    // Divided, not multiplied by a reciprocal: keys of one channel then tie exactly, as in the torch formulation.
    for (int64_t d = 0; d < depth; ++d) to[d * width + i] = rows[i * depth + d] / lengths[i];
  }
}

// Similarities of kRows rows with kColumns columns, folded into each row's running best. A strict comparison over
// ascending columns leaves ties with the lowest one; NaN never compares larger. A function of its own: inlined into a
// larger one, its sums no longer all get registers.
__attribute__((noinline)) void match_tile(const float* __restrict rows, const float* __restrict panel, int64_t depth,
                                          const float* edge, int32_t column, float* __restrict best,
                                          int32_t* __restrict where) {
  Vector sums[kRows][kWide] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector other[kWide];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) other[v] = read(panel + d * kColumns + v * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const float one = rows[d * kRows + i];
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) sums[i][v] += one * other[v];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    Vector top = read(best + i * kLanes);
    Mask from;
    std::memcpy(&from, where + i * kLanes, sizeof from);
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) {
      // The zero of a full tile makes minus zero the same as zero, also for the order of bits later.
      const Vector similarity = sums[i][v] + read(edge + v * kLanes);
      const Mask larger = similarity > top;
      top = larger ? similarity : top;
      from = larger ? Mask{} + (column + v * kLanes) : from;
    }
    write(best + i * kLanes, top);
    std::memcpy(where + i * kLanes, &from, sizeof from);
  }
}

void match_rows(const Image& image, int64_t nb, int64_t depth, int64_t first_tile, int64_t last_tile) {
  const int64_t panels = tiles(nb, kColumns), panel_size = kColumns * depth;
  const int64_t block = std::max<int64_t>(1, kPanelBytes / (panel_size * int64_t{sizeof(float)}));
  for (int64_t begin = 0; begin < panels; begin += block) {
    const int64_t end = std::min(begin + block, panels);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t row = tile * kRows;
      for (int64_t panel = begin; panel < end; ++panel) {
        const float* edge = image.edge + (panel == panels - 1 ? kColumns : 0);
        match_tile(image.a + row * depth, image.b + panel * panel_size, depth, edge,
                   static_cast<int32_t>(panel * kColumns), image.best + row * kLanes, image.where + row * kLanes);
      }
    }
  }
}

// Each row's best over its lanes; among equals the lowest column, so column 0 if all similarities were NaN.
void reduce_lanes(const Image& image, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const float* best = image.best + i * kLanes;
    const int32_t* where = image.where + i * kLanes;
    float top = best[0];
    int32_t column = where[0];
    for (int32_t lane = 1; lane < kLanes; ++lane) {
      const int32_t candidate = where[lane] + lane;
      const bool better = best[lane] > top || (best[lane] == top && candidate < column);
      top = better ? best[lane] : top;
      column = better ? candidate : column;
    }
    image.score[i] = top;
    image.partner[i] = column;
  }
}

void match(const Keys& keys, int64_t image, const Positions& a, const Positions& b, const Image& to, float* rows,
           int32_t threads) {
  const int64_t row_tiles = tiles(a.count, kRows), column_tiles = tiles(b.count, kColumns);
  split(threads, [&](int32_t part) {
    float* own = rows + part * kColumns * keys.depth;
    for (int64_t tile = share(row_tiles, part, threads); tile < share(row_tiles, part + 1, threads); ++tile)
      fill_tile<kRows>(keys, image, a, tile, own, to.a + tile * kRows * keys.depth);
    for (int64_t tile = share(column_tiles, part, threads); tile < share(column_tiles, part + 1, threads); ++tile)
      fill_tile<kColumns>(keys, image, b, tile, own, to.b + tile * kColumns * keys.depth);
  });
  split(threads, [&](int32_t part) {
    const int64_t first = share(row_tiles, part, threads), last = share(row_tiles, part + 1, threads);
    std::fill(to.best + first * kRows * kLanes, to.best + last * kRows * kLanes, -kInfinity);
    std::fill(to.where + first * kRows * kLanes, to.where + last * kRows * kLanes, 0);
    match_rows(to, b.count, keys.depth, first, last);
    reduce_lanes(to, first * kRows, std::min(last * kRows, a.count));
  });
}

// Orders by score, largest first, then by index: one unsigned comparison.
uint64_t rank_key(float score, int64_t index) {
  const uint32_t bits = bits_of(score);
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{~ascending} << 32 | static_cast<uint64_t>(index);
}

// Slots: prefix, unmerged tokens of a (in order with a prefix, else best match first), then b in order.
void place(const Image& image, const Positions& a, const Positions& b, int64_t r, int64_t prefix, uint64_t* ranks,
           int64_t* assign) {
  for (int64_t i = 0; i < a.count; ++i) ranks[i] = rank_key(image.score[i], i);
  std::nth_element(ranks, ranks + r, ranks + a.count);
  const auto index = [ranks](int64_t rank) { return static_cast<int64_t>(ranks[rank] & 0xffffffffu); };
  const int64_t first_b = prefix + a.count - r;
  for (int64_t token = 0; token < prefix; ++token) assign[token] = token;
  for (int64_t i = 0; i < a.count; ++i) assign[a.at(i)] = -1;
  for (int64_t rank = 0; rank < r; ++rank) assign[a.at(index(rank))] = first_b + image.partner[index(rank)];
  int64_t next = prefix;
  if (prefix > 0) {
    for (int64_t i = 0; i < a.count; ++i) {
      int64_t& slot = assign[a.at(i)];
      const bool stays = slot < 0;
      slot = stays ? next : slot;
      next += stays;
    }
  } else {
    // With a comparison of its own: libc++ keeps the plain sort in its library, which is not linked.
    std::sort(ranks + r, ranks + a.count, [](uint64_t x, uint64_t y) { return x < y; });
    for (int64_t rank = r; rank < a.count; ++rank) assign[a.at(index(rank))] = next++;
  }
  for (int64_t j = 0; j < b.count; ++j) assign[b.at(j)] = first_b + j;
}

// Tokens by slot in compressed sparse rows, ascending inside a slot.
void group(const int64_t* assign, int64_t length, int64_t slots, int32_t* csr, int32_t* src, int32_t* next) {
  std::fill(next, next + slots, 0);
  for (int64_t token = 0; token < length; ++token) ++next[assign[token]];
  int32_t start = 0;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t count = next[slot];
    csr[slot] = next[slot] = start;
    start += count;
  }
  csr[slots] = start;
  for (int64_t token = 0; token < length; ++token) src[next[assign[token]]++] = static_cast<int32_t>(token);
}

}  // namespace
}  // namespace visiontok

// Returns 0, or 1 without memory.
VISIONTOK_EXPORT int visiontok_match_slots(int32_t dtype, const void* key, int64_t batch, int64_t heads, int64_t length,
                                     int64_t depth, int64_t stride_image, int64_t stride_head, int64_t stride_token,
                                     int64_t r, int64_t prefix, int64_t* assign, int32_t* csr, int32_t* src,
                                     int32_t threads) {
  using namespace visiontok;
  const Keys keys{key, dtype, heads, depth, stride_image, stride_head, stride_token};
  const int64_t first_a = prefix + prefix % 2, first_b = prefix + (prefix + 1) % 2, slots = length - r;
  const Positions a{first_a, (length - first_a + 1) / 2}, b{first_b, (length - first_b + 1) / 2};
  // Whole images to each thread where there are enough of them, else parts of one image after the other.
  const int32_t outer = batch >= threads ? threads : 1, inner = outer == 1 ? threads : 1;
  const size_t each = Image::bytes(a.count, b.count, depth) + Pieces::bytes<float>(inner * kColumns * depth) +
                      Pieces::bytes<uint64_t>(a.count) + Pieces::bytes<int32_t>(slots);
  Workspace space(each * outer);
  if (!space) return 1;
  char* pieces = space.take<char>(static_cast<int64_t>(each) * outer);
  split(outer, [&](int32_t part) {
    Pieces own(pieces + each * part);
    const Image buffers(own, a.count, b.count, depth);
    float* rows = own.take<float>(inner * kColumns * depth);
    uint64_t* ranks = own.take<uint64_t>(a.count);
    int32_t* next = own.take<int32_t>(slots);
    for (int64_t image = share(batch, part, outer); image < share(batch, part + 1, outer); ++image) {
      match(keys, image, a, b, buffers, rows, inner);
      place(buffers, a, b, r, prefix, ranks, assign + image * length);
      group(assign + image * length, length, slots, csr + image * (slots + 1), src + image * length, next);
    }
  });
  return 0;
}
