// AttentionBackward for one target; attention.h holds the contract.
#ifndef FEDSPINE_CSRC_ATTENTION_BACKWARD_INL_H_
#define FEDSPINE_CSRC_ATTENTION_BACKWARD_INL_H_

#include "attention-inl.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

constexpr Index kQueryBlock = 64;  // Queries of one block: p^T and ds^T are 32 KB each.

struct AttentionBackwardScratch {
  Index width;         // D rounded up to panels.
  int* keys;           // [T]
  float* rows;         // [T, width]: rows before they are packed, or after they were unpacked.
  float* k_panels;     // [D / 32][keys][32]
  float* k_columns;    // Of k's columns: [keys / 32][D][32]
  float* v_panels;     // [D / 32][keys][32]
  float* q_rows;       // scale * rope(q): [T, width]
  float* q_panels;     // The same: [T / 32][D][32]
  float* dout_rows;    // [T, width]
  float* dout_panels;  // [T / 32][D][32]
  float* lse;          // [T], zeros up to a whole panel
  float* delta;        // rowsum(dout * out): the same
  float* p;            // p^T of a block: [queries / 32][keys][32]
  float* ds;           // ds^T of a block: the same
  float* dq;           // dq^T: [T / 32][D][32]
  float* dk;           // [keys, width]
  float* dv;           // [keys, width]
};

inline AttentionBackwardScratch LayOutAttentionBackward(const AttentionShape& shape, float* memory,
                                                        Index* floats) {
  ScratchCursor cursor{memory, 0};
  AttentionBackwardScratch scratch;
  const Index tokens = shape.tokens, padded = RoundUp(tokens, kPanelWidth), dim = shape.head_dim;
  scratch.width = RoundUp(dim, kPanelWidth);
  scratch.keys = reinterpret_cast<int*>(cursor.Take(tokens));
  scratch.rows = cursor.Take(tokens * scratch.width);
  scratch.k_panels = cursor.Take(tokens * scratch.width);
  scratch.k_columns = cursor.Take(padded * dim);
  scratch.v_panels = cursor.Take(tokens * scratch.width);
  scratch.q_rows = cursor.Take(tokens * scratch.width);
  scratch.q_panels = cursor.Take(padded * dim);
  scratch.dout_rows = cursor.Take(tokens * scratch.width);
  scratch.dout_panels = cursor.Take(padded * dim);
  scratch.lse = cursor.Take(padded);
  scratch.delta = cursor.Take(padded);
  scratch.p = cursor.Take(kQueryBlock * kKeyBlock);
  scratch.ds = cursor.Take(kQueryBlock * kKeyBlock);
  scratch.dq = cursor.Take(padded * dim);
  scratch.dk = cursor.Take(tokens * scratch.width);
  scratch.dv = cursor.Take(tokens * scratch.width);
  *floats = cursor.taken;
  return scratch;
}

inline Index AttentionBackwardScratchFloats(const AttentionShape& shape, int num_threads) {
  Index floats = 0;
  LayOutAttentionBackward(shape, nullptr, &floats);
  return floats * AttentionParts(shape, num_threads);
}

inline void PackGroup(const AttentionInputs& in, const AttentionBackwardScratch& scratch,
                      const HeadGroup& group) {
  const Index dim = in.shape.head_dim, width = scratch.width, count = group.num_keys;
  TakeRows(KeyRows(in, in.k, group), group.keys, count, dim, scratch.rows, width);
  PackRows(scratch.rows, width, count, dim, scratch.k_panels);
  PackTransposed(scratch.rows, width, count, dim, scratch.k_columns);
  TakeRows(Unrotated(KeyRows(in, in.v, group)), group.keys, count, dim, scratch.rows, width);
  PackRows(scratch.rows, width, count, dim, scratch.v_panels);
  for (Index i = 0; i < count * width; ++i) scratch.dk[i] = scratch.dv[i] = 0;
}

inline void PackHead(const AttentionBackwardArgs& args, const AttentionBackwardScratch& scratch,
                     const HeadGroup& group, Index head) {
  const AttentionInputs& in = args.in;
  const Index tokens = in.shape.tokens, dim = in.shape.head_dim, width = scratch.width;
  TakeRows(QueryRows(in, in.q, group.row, head), nullptr, tokens, dim, scratch.q_rows, width);
  PackTransposed(scratch.q_rows, width, tokens, dim, scratch.q_panels);
  const HeadRows dout = Unrotated(QueryRows(in, args.dout, group.row, head));
  TakeRows(dout, nullptr, tokens, dim, scratch.dout_rows, width);
  PackTransposed(scratch.dout_rows, width, tokens, dim, scratch.dout_panels);
  const HeadRows out = Unrotated(QueryRows(in, args.out, group.row, head));
  const float* const lse = args.lse + (group.row * in.shape.heads + head) * tokens;
  const Index padded = RoundUp(tokens, kPanelWidth);
  for (Index t = 0; t < padded; ++t) {
    scratch.lse[t] = t < tokens ? lse[t] : 0;
    scratch.delta[t] = t < tokens
                           ? SumVectors(
                                 dim,
                                 [&](Index i, Index count) {
                                   return LoadUpTo(scratch.dout_rows + t * width + i, count) *
                                          LoadUpTo(out.first + t * out.stride + i, count);
                                 })
                           : 0;
  }
  for (Index i = 0; i < padded * dim; ++i) scratch.dq[i] = 0;
}

// s^T and dp^T of a panel become p^T and ds^T.
inline void DifferentiateSoftmax(const HeadGroup& group, const AttentionBackwardScratch& scratch,
                                 const ScoreBlock& block, Index seen_by_all, float* p, float* ds) {
  const Index num_keys = block.keys.end - block.keys.begin;
  const Index plain =
      seen_by_all < block.keys.begin ? 0 : Min(num_keys, seen_by_all - block.keys.begin);
  for (Index lane = 0; lane < kPanelWidth; lane += kLanes) {
    const Index query = block.queries.begin + lane;
    const V lse = Load(scratch.lse + query), delta = Load(scratch.delta + query);
    for (Index j = 0; j < num_keys; ++j) {
      const Index place = j * kPanelWidth + lane;
      V power = ExpOfNegative(Load(p + place) - lse);
      V slope = power * (Load(ds + place) - delta);
      if (j >= plain) {
        const Bits sees = SeesKey(query, group.keys[block.keys.begin + j]);
        power = sees ? power : V{};
        slope = sees ? slope : V{};
      }
      Store(power, p + place);
      Store(slope, ds + place);
    }
  }
}

inline void BackwardScores(const AttentionBackwardArgs& args,
                           const AttentionBackwardScratch& scratch, const HeadGroup& group,
                           const ScoreBlock& block, Index seen_by_all) {
  const Index dim = args.in.shape.head_dim, num_keys = block.keys.end - block.keys.begin;
  const Index panel = block.queries.begin % kQueryBlock * num_keys;
  float* const p = scratch.p + panel;
  float* const ds = scratch.ds + panel;
  Scores(args.in, group, block, scratch.k_panels, scratch.q_panels + block.queries.begin * dim, p);
  Multiply({{scratch.v_panels + block.keys.begin * kPanelWidth, group.num_keys * kPanelWidth,
             scratch.dout_panels + block.queries.begin * dim, kPanelWidth, dim},
            num_keys,
            kPanelWidth,
            false,
            ds,
            kPanelWidth});
  DifferentiateSoftmax(group, scratch, block, seen_by_all, p, ds);
  Multiply(
      {{scratch.k_columns + block.keys.begin * dim, dim * kPanelWidth, ds, kPanelWidth, num_keys},
       dim,
       kPanelWidth,
       true,
       scratch.dq + block.queries.begin * dim,
       kPanelWidth});
}

// One block of queries against one block of keys.
inline void BackwardScoreBlock(const AttentionBackwardArgs& args,
                               const AttentionBackwardScratch& scratch, const HeadGroup& group,
                               const ScoreBlock& block, const float* bias) {
  const Index tokens = args.in.shape.tokens, dim = args.in.shape.head_dim, width = scratch.width;
  const Range queries = block.queries;
  for (Index q = queries.begin; q < queries.end; q += kPanelWidth) {
    const Range panel = {q, Min(q + kPanelWidth, queries.end)};
    const float* const rows = bias == nullptr ? nullptr : bias + q * tokens;
    const Index seen_by_all = SeenKeys(args.in, group, panel).all;
    BackwardScores(args, scratch, group, {block.keys, panel, rows}, seen_by_all);
  }
  const Index num_keys = block.keys.end - block.keys.begin;
  const auto update = [&](const float* panels, const float* rows, float* out) {
    Multiply({{panels, num_keys * kPanelWidth, rows + queries.begin * width, width,
               queries.end - queries.begin},
              num_keys,
              dim,
              true,
              out + block.keys.begin * width,
              width});
  };
  update(scratch.p, scratch.dout_rows, scratch.dv);
  update(scratch.ds, scratch.q_rows, scratch.dk);
}

inline void StoreRowsBack(const HeadRows& rows, const float* from, Index from_stride,
                          const int* tokens, Index count, Index dim, float* first) {
  for (Index i = 0; i < count; ++i) {
    const Index t = tokens == nullptr ? i : tokens[i];
    const float* const cos = rows.cos == nullptr ? nullptr : rows.cos + t * dim;
    const float* const sin = rows.cos == nullptr ? nullptr : rows.sin + t * dim;
    RotateRowBack(from + i * from_stride, cos, sin, rows.scale, dim, first + t * rows.stride);
  }
}

inline void BackwardHead(const AttentionBackwardArgs& args, const AttentionBackwardScratch& scratch,
                         const HeadGroup& group, Index head) {
  const AttentionInputs& in = args.in;
  const Index tokens = in.shape.tokens, dim = in.shape.head_dim, width = scratch.width;
  PackHead(args, scratch, group, head);
  for (Index q = 0; q < tokens; q += kQueryBlock) {
    const Range queries = {q, Min(q + kQueryBlock, tokens)};
    const Index seen = SeenKeys(in, group, queries).some;
    for (Index k = 0; k < seen; k += kKeyBlock) {
      BackwardScoreBlock(args, scratch, group, {{k, Min(k + kKeyBlock, seen)}, queries, nullptr},
                         BiasRows(in, head, 0));
    }
  }
  for (Index q = 0; q < tokens; q += kPanelWidth) {
    TransposeMatrix(scratch.dq + q * dim, kPanelWidth, dim, Min(kPanelWidth, tokens - q),
                    scratch.rows + q * width, width);
  }
  const HeadRows rows = QueryRows(in, in.q, group.row, head);
  StoreRowsBack(rows, scratch.rows, width, nullptr, tokens, dim, args.dq + (rows.first - in.q));
}

inline void BackwardGroup(const AttentionBackwardArgs& args,
                          const AttentionBackwardScratch& scratch, const HeadGroup& group) {
  const AttentionInputs& in = args.in;
  const Index tokens = in.shape.tokens, dim = in.shape.head_dim;
  PackGroup(in, scratch, group);
  const Index heads = in.shape.heads / in.shape.kv_heads;
  for (Index head = group.kv_head * heads; head < (group.kv_head + 1) * heads; ++head) {
    BackwardHead(args, scratch, group, head);
  }
  const HeadRows rows = KeyRows(in, in.k, group);
  float* const dk = args.dk + (rows.first - in.k);
  float* const dv = args.dv + (rows.first - in.k);
  for (Index t = 0; group.num_keys < tokens && t < tokens; ++t) {
    for (Index d = 0; d < dim; ++d) dk[t * rows.stride + d] = dv[t * rows.stride + d] = 0;
  }
  StoreRowsBack(rows, scratch.dk, scratch.width, group.keys, group.num_keys, dim, dk);
  StoreRowsBack(Unrotated(rows), scratch.dv, scratch.width, group.keys, group.num_keys, dim, dv);
}

inline void AttentionBackward(const AttentionBackwardArgs& args, float* memory) {
  const AttentionShape& shape = args.in.shape;
  const Index parts = AttentionParts(shape, args.in.num_threads);
  RunParts(parts, [&](Index part) {
    Index floats = 0;
    LayOutAttentionBackward(shape, nullptr, &floats);
    const AttentionBackwardScratch scratch =
        LayOutAttentionBackward(shape, memory + part * floats, &floats);
    const Range units = PartRange(shape.batch * shape.kv_heads, 1, part, parts);
    ForEachGroup(args.in, units, scratch.keys,
                 [&](const HeadGroup& group) { BackwardGroup(args, scratch, group); });
  });
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_ATTENTION_BACKWARD_INL_H_
