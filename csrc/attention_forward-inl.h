// AttentionForward for one target; attention.h holds the contract.
#ifndef FEDSPINE_CSRC_ATTENTION_FORWARD_INL_H_
#define FEDSPINE_CSRC_ATTENTION_FORWARD_INL_H_

#include "attention-inl.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

struct AttentionForwardScratch {
  int* keys;        // [T]
  float* rows;      // [T, D]: a head's rows, rotated, before they are packed.
  float* k_panels;  // [D / 32][keys][32]
  float* v_panels;  // Of v's columns: [keys / 32][D][32]
  float* q_panels;  // [T / 32][D][32]
  float* scores;    // s^T, then p^T of a block: [keys][32]
  float* sums;      // p v of a panel, transposed: [D][32]
  float* highest;   // [32]: the greatest score so far,
  float* total;     // [32]: and the sum of e^(s - highest).
};

inline AttentionForwardScratch LayOutAttentionForward(const AttentionShape& shape, float* memory,
                                                      Index* floats) {
  ScratchCursor cursor{memory, 0};
  AttentionForwardScratch scratch;
  const Index padded = RoundUp(shape.tokens, kPanelWidth), dim = shape.head_dim;
  scratch.keys = reinterpret_cast<int*>(cursor.Take(shape.tokens));
  scratch.rows = cursor.Take(shape.tokens * dim);
  scratch.k_panels = cursor.Take(shape.tokens * RoundUp(dim, kPanelWidth));
  scratch.v_panels = cursor.Take(padded * dim);
  scratch.q_panels = cursor.Take(padded * dim);
  scratch.scores = cursor.Take(kKeyBlock * kPanelWidth);
  scratch.sums = cursor.Take(dim * kPanelWidth);
  scratch.highest = cursor.Take(kPanelWidth);
  scratch.total = cursor.Take(kPanelWidth);
  *floats = cursor.taken;
  return scratch;
}

inline Index AttentionForwardScratchFloats(const AttentionShape& shape, int num_threads) {
  Index floats = 0;
  LayOutAttentionForward(shape, nullptr, &floats);
  return floats * AttentionParts(shape, num_threads);
}

// Turns a block's scores into e^(s - highest), and rescales what was summed before it.
inline void SoftmaxBlock(const HeadGroup& group, const AttentionForwardScratch& scratch,
                         const ScoreBlock& block, Index seen_by_all, Index dim) {
  const Index num_keys = block.keys.end - block.keys.begin;
  for (Index lane = 0; lane < kPanelWidth; lane += kLanes) {
    float* const scores = scratch.scores + lane;
    const Index query = block.queries.begin + lane;
    const auto sees = [&](Index j) { return SeesKey(query, group.keys[block.keys.begin + j]); };
    const Index plain =
        seen_by_all < block.keys.begin ? 0 : Min(num_keys, seen_by_all - block.keys.begin);
    const V before = Load(scratch.highest + lane);
    V highest = before;
    for (Index j = 0; j < plain; ++j) {
      const V score = Load(scores + j * kPanelWidth);
      highest = highest > score ? highest : score;
    }
    for (Index j = plain; j < num_keys; ++j) {
      const V score = sees(j) ? Load(scores + j * kPanelWidth) : Broadcast(kLowest);
      highest = highest > score ? highest : score;
    }
    const V shrink = ExpOfNegative(before - highest);
    V total = Load(scratch.total + lane) * shrink;
    for (Index j = 0; j < plain; ++j) {
      const V power = ExpOfNegative(Load(scores + j * kPanelWidth) - highest);
      Store(power, scores + j * kPanelWidth);
      total += power;
    }
    for (Index j = plain; j < num_keys; ++j) {
      const V power = ExpOfNegative(Load(scores + j * kPanelWidth) - highest);
      const V seen = sees(j) ? power : V{};
      Store(seen, scores + j * kPanelWidth);
      total += seen;
    }
    Store(highest, scratch.highest + lane);
    Store(total, scratch.total + lane);
    if (block.keys.begin == 0) continue;
    for (Index d = 0; d < dim; ++d) {
      float* const sum = scratch.sums + d * kPanelWidth + lane;
      Store(Load(sum) * shrink, sum);
    }
  }
}

// Writes the panel's outputs and its log-sum-exps.
inline void FinishPanel(const AttentionForwardArgs& args, const AttentionForwardScratch& scratch,
                        const HeadGroup& group, Index head, Range queries) {
  const AttentionShape& shape = args.in.shape;
  const Index dim = shape.head_dim, num_queries = queries.end - queries.begin;
  for (Index lane = 0; lane < kPanelWidth; lane += kLanes) {
    const V total = Load(scratch.total + lane);
    const V factor = total == 0.0f ? V{} : 1.0f / total;
    for (Index d = 0; d < dim; ++d) {
      float* const sum = scratch.sums + d * kPanelWidth + lane;
      Store(Load(sum) * factor, sum);
    }
  }
  const Index stride = shape.heads * dim;
  TransposeMatrix(scratch.sums, kPanelWidth, dim, num_queries,
                  args.out + (group.row * shape.tokens + queries.begin) * stride + head * dim,
                  stride);
  if (args.lse == nullptr) return;
  float* const lse = args.lse + (group.row * shape.heads + head) * shape.tokens + queries.begin;
  for (Index q = 0; q < num_queries; ++q) {
    const float total = scratch.total[q];
    lse[q] = total == 0 ? 0 : scratch.highest[q] + LogOf(total);
  }
}

inline void ForwardPanel(const AttentionForwardArgs& args, const AttentionForwardScratch& scratch,
                         const HeadGroup& group, Index head, Range queries) {
  const Index dim = args.in.shape.head_dim;
  const Seen seen = SeenKeys(args.in, group, queries);
  for (Index q = 0; q < kPanelWidth; ++q) {
    scratch.highest[q] = kLowest;
    scratch.total[q] = 0;
  }
  for (Index i = 0; seen.some == 0 && i < dim * kPanelWidth; ++i) scratch.sums[i] = 0;
  for (Index begin = 0; begin < seen.some; begin += kKeyBlock) {
    const ScoreBlock block = {{begin, Min(begin + kKeyBlock, seen.some)},
                              queries,
                              BiasRows(args.in, head, queries.begin)};
    Scores(args.in, group, block, scratch.k_panels, scratch.q_panels + queries.begin * dim,
           scratch.scores);
    SoftmaxBlock(group, scratch, block, seen.all, dim);
    Multiply({{scratch.v_panels + begin * dim, dim * kPanelWidth, scratch.scores, kPanelWidth,
               block.keys.end - begin},
              dim,
              kPanelWidth,
              begin > 0,
              scratch.sums,
              kPanelWidth});
  }
  FinishPanel(args, scratch, group, head, queries);
}

inline void ForwardGroup(const AttentionForwardArgs& args, const AttentionForwardScratch& scratch,
                         const HeadGroup& group) {
  const AttentionInputs& in = args.in;
  const Index dim = in.shape.head_dim, tokens = in.shape.tokens;
  TakeRows(KeyRows(in, in.k, group), group.keys, group.num_keys, dim, scratch.rows, dim);
  PackRows(scratch.rows, dim, group.num_keys, dim, scratch.k_panels);
  TakeRows(Unrotated(KeyRows(in, in.v, group)), group.keys, group.num_keys, dim, scratch.rows, dim);
  PackTransposed(scratch.rows, dim, group.num_keys, dim, scratch.v_panels);
  const Index heads = in.shape.heads / in.shape.kv_heads;
  for (Index head = group.kv_head * heads; head < (group.kv_head + 1) * heads; ++head) {
    TakeRows(QueryRows(in, in.q, group.row, head), nullptr, tokens, dim, scratch.rows, dim);
    PackTransposed(scratch.rows, dim, tokens, dim, scratch.q_panels);
    for (Index begin = 0; begin < tokens; begin += kPanelWidth) {
      ForwardPanel(args, scratch, group, head, {begin, Min(begin + kPanelWidth, tokens)});
    }
  }
}

inline void AttentionForward(const AttentionForwardArgs& args, float* memory) {
  const AttentionShape& shape = args.in.shape;
  const Index parts = AttentionParts(shape, args.in.num_threads);
  RunParts(parts, [&](Index part) {
    Index floats = 0;
    LayOutAttentionForward(shape, nullptr, &floats);
    const AttentionForwardScratch scratch =
        LayOutAttentionForward(shape, memory + part * floats, &floats);
    const Range units = PartRange(shape.batch * shape.kv_heads, 1, part, parts);
    ForEachGroup(args.in, units, scratch.keys,
                 [&](const HeadGroup& group) { ForwardGroup(args, scratch, group); });
  });
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_ATTENTION_FORWARD_INL_H_
