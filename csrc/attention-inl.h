// What both directions of attention share for one target; attention.h holds the contract.
//
// Queries lie in lanes, 32 to a panel, and keys in rows: s^T = k q^T is one tile after another, a
// softmax runs down the rows without crossing lanes, and s^T is at once the panel that the next
// product reads.
#ifndef FEDSPINE_CSRC_ATTENTION_INL_H_
#define FEDSPINE_CSRC_ATTENTION_INL_H_

#include "attention.h"
#include "blocking-inl.h"
#include "elementwise-inl.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

constexpr Index kKeyBlock = 128;     // Keys of one block: s^T of a panel is 16 KB.
constexpr float kLowest = -3.4e38f;  // Finite, so that its difference with itself is a number.

// e^x for x of at most about 80, to 2 ulp; at least e^-87, which is as good as zero.
FEDSPINE_INLINE V ExpOfNegative(V x) {
  const SplitExp parts = ExpParts(x < -87.0f ? Broadcast(-87.0f) : x);  // A NaN is not below.
  return parts.mantissa * PowerOfTwo(parts.exponent);
}

// The natural logarithm of one float: no call may leave this unit, and a panel has 32.
inline float LogOf(float x) { return __builtin_logf(x); }

// One row of the batch and one KV head: what a thread works on at a time.
struct HeadGroup {
  Index row;
  Index kv_head;
  const int* keys;  // Positions of the keys that are there, ascending.
  Index num_keys;
};

// Lists the keys of a row of the batch that are there.
inline Index ListKeys(const AttentionInputs& in, Index row, int* keys) {
  const Index tokens = in.shape.tokens;
  Index count = 0;
  for (Index t = 0; t < tokens; ++t) {
    if (in.valid == nullptr || in.valid[row * tokens + t] != 0) keys[count++] = static_cast<int>(t);
  }
  return count;
}

// Of ascending positions, how many are at most `last`.
inline Index CountUpTo(const HeadGroup& group, Index last) {
  Index count = group.num_keys;
  while (count > 0 && group.keys[count - 1] > last) --count;
  return count;
}

// Keys that any query before `end` sees, and how many of these all queries from `begin` on see.
struct Seen {
  Index some;
  Index all;
};

inline Seen SeenKeys(const AttentionInputs& in, const HeadGroup& group, Range queries) {
  if (!in.causal) return {group.num_keys, group.num_keys};
  return {CountUpTo(group, queries.end - 1), CountUpTo(group, queries.begin)};
}

// Lanes whose query, the first being `query`, is at or after a key.
FEDSPINE_INLINE Bits SeesKey(Index query, int key) {
  Bits lanes;
  FEDSPINE_UNROLL(16)
  for (Index lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<int>(lane);
  return lanes >= key - static_cast<int>(query);
}

// out = scale * rope(x) for one token's head, D floats.
inline void RotateRow(const float* x, const float* cos, const float* sin, float scale, Index dim,
                      float* out) {
  if (cos == nullptr) {
    ForEachVector(0, dim, [&](Index i, Index count) {
      StoreUpTo(LoadUpTo(x + i, count) * scale, out + i, count);
    });
    return;
  }
  const Index half = dim / 2;
  ForEachVector(0, half, [&](Index i, Index count) {
    const V low = LoadUpTo(x + i, count) * scale, high = LoadUpTo(x + half + i, count) * scale;
    StoreUpTo(low * LoadUpTo(cos + i, count) - high * LoadUpTo(sin + i, count), out + i, count);
    StoreUpTo(high * LoadUpTo(cos + half + i, count) + low * LoadUpTo(sin + half + i, count),
              out + half + i, count);
  });
}

// out = scale * rope^T(dy): the rotation backward.
inline void RotateRowBack(const float* dy, const float* cos, const float* sin, float scale,
                          Index dim, float* out) {
  if (cos == nullptr) return RotateRow(dy, cos, sin, scale, dim, out);
  const Index half = dim / 2;
  ForEachVector(0, half, [&](Index i, Index count) {
    const V low = LoadUpTo(dy + i, count) * scale, high = LoadUpTo(dy + half + i, count) * scale;
    StoreUpTo(low * LoadUpTo(cos + i, count) + high * LoadUpTo(sin + half + i, count), out + i,
              count);
    StoreUpTo(high * LoadUpTo(cos + half + i, count) - low * LoadUpTo(sin + i, count),
              out + half + i, count);
  });
}

// One head of q, k, v or of a gradient: its tokens' rows, and how they are rotated.
struct HeadRows {
  const float* first;  // The head's row of token 0.
  Index stride;        // Floats from a token to the next.
  const float* cos;    // Of token 0; null for no rotation.
  const float* sin;
  float scale;
};

inline HeadRows QueryRows(const AttentionInputs& in, const float* q, Index row, Index head) {
  const Index stride = in.shape.heads * in.shape.head_dim;
  const Index turn = row * in.rotation_stride;
  return {q + row * in.shape.tokens * stride + head * in.shape.head_dim, stride,
          in.cos == nullptr ? nullptr : in.cos + turn, in.cos == nullptr ? nullptr : in.sin + turn,
          in.scale};
}

inline HeadRows KeyRows(const AttentionInputs& in, const float* k, const HeadGroup& group) {
  const Index stride = in.shape.kv_heads * in.shape.head_dim;
  const Index turn = group.row * in.rotation_stride;
  return {k + group.row * in.shape.tokens * stride + group.kv_head * in.shape.head_dim, stride,
          in.cos == nullptr ? nullptr : in.cos + turn, in.cos == nullptr ? nullptr : in.sin + turn,
          1.0f};
}

inline HeadRows Unrotated(HeadRows rows) {
  rows.cos = rows.sin = nullptr;
  rows.scale = 1.0f;
  return rows;
}

// Rotated rows of the given tokens (the first `count` when null), `out_stride` apart.
inline void TakeRows(const HeadRows& rows, const int* tokens, Index count, Index dim, float* out,
                     Index out_stride) {
  for (Index i = 0; i < count; ++i) {
    const Index t = tokens == nullptr ? i : tokens[i];
    const float* const cos = rows.cos == nullptr ? nullptr : rows.cos + t * dim;
    const float* const sin = rows.cos == nullptr ? nullptr : rows.sin + t * dim;
    RotateRow(rows.first + t * rows.stride, cos, sin, rows.scale, dim, out + i * out_stride);
  }
}

// Panels of rows[count, dim] whose rows a tile broadcasts: [dim / 32][count][32].
inline void PackRows(const float* rows, Index stride, Index count, Index dim, float* out) {
  for (Index d = 0; d < dim; d += kPanelWidth) {
    CopyMatrix(rows + d, stride, count, Min(kPanelWidth, dim - d), out + d * count, kPanelWidth);
  }
}

// out[rows, columns] = a b, or += a b: a in panels of its rows, b in rows of at least `columns`
// floats rounded up to vectors.
struct MatrixProduct {
  Product factors;
  Index rows;
  Index columns;
  bool accumulate;
  float* out;
  Index out_stride;
};

inline void Multiply(const MatrixProduct& product) {
  for (Index tile = 0; tile < NumTiles(product.rows); ++tile) {
    const Range rows = TileRange(product.rows, tile);
    for (Index column = 0; column < product.columns; column += kTileColumns) {
      Tile call = {};
      call.main = product.factors;
      call.main.a += rows.begin * kPanelWidth;
      call.main.b += column;
      call.scale = 1;
      call.out = product.out + rows.begin * product.out_stride + column;
      call.out_stride = product.out_stride;
      call.init = product.accumulate ? call.out : nullptr;
      call.init_stride = product.out_stride;
      call.columns = Min(kTileColumns, product.columns - column);
      RunTile<false>(rows.end - rows.begin, call);
    }
  }
}

// s^T [keys, 32] = k q^T + bias^T for a block of keys and a panel of queries.
struct ScoreBlock {
  Range keys;         // Among the keys that are there.
  Range queries;      // At most 32 tokens.
  const float* bias;  // [32, T]-strided rows of the head's bias from the first query on, or null.
};

inline void AddBias(const AttentionInputs& in, const HeadGroup& group, const ScoreBlock& block,
                    float* scores) {
  const Index num_queries = block.queries.end - block.queries.begin;
  for (Index j = block.keys.begin; j < block.keys.end; ++j, scores += kPanelWidth) {
    const float* const column = block.bias + group.keys[j];
    for (Index q = 0; q < num_queries; ++q) scores[q] += column[q * in.shape.tokens];
  }
}

inline void Scores(const AttentionInputs& in, const HeadGroup& group, const ScoreBlock& block,
                   const float* k_panels, const float* q_panel, float* scores) {
  const Index dim = in.shape.head_dim;
  Multiply({{k_panels + block.keys.begin * kPanelWidth, group.num_keys * kPanelWidth, q_panel,
             kPanelWidth, dim},
            block.keys.end - block.keys.begin,
            kPanelWidth,
            false,
            scores,
            kPanelWidth});
  if (block.bias != nullptr) AddBias(in, group, block, scores);
}

inline const float* BiasRows(const AttentionInputs& in, Index head, Index query) {
  const Index tokens = in.shape.tokens;
  return in.bias == nullptr ? nullptr : in.bias + (head * tokens + query) * tokens;
}

// Parts of a call: rows of the batch times KV heads, shared out.
inline Index AttentionParts(const AttentionShape& shape, int num_threads) {
  const double flops = 4.0 * static_cast<double>(shape.batch * shape.heads) *
                       static_cast<double>(shape.tokens) *
                       static_cast<double>(shape.tokens * shape.head_dim);
  return Min(shape.batch * shape.kv_heads, UsefulParts(flops, num_threads));
}

// Calls visit(group) for every group of a part, in ascending order; `keys` holds T ints.
template <typename Visit>
inline void ForEachGroup(const AttentionInputs& in, Range units, int* keys, const Visit& visit) {
  Index listed = -1, num_keys = 0;
  for (Index unit = units.begin; unit < units.end; ++unit) {
    const Index row = unit / in.shape.kv_heads;
    if (row != listed) num_keys = ListKeys(in, row, keys);
    listed = row;
    visit(HeadGroup{row, unit % in.shape.kv_heads, keys, num_keys});
  }
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_ATTENTION_INL_H_
