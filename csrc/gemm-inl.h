// Register tiles and the one layout they read: panels of kPanelWidth columns.
//
// Panels of a matrix [rows, columns] are [columns / 32][rows][32]. A tile multiplies
//   a: panels whose rows are the tile's rows and whose columns are the depth k (broadcast), and
//   b: rows k of at least the tile's columns (loaded as vectors).
// The packed weight serves as b forward (vectors of outputs) and as a backward (rows of inputs), so
// one copy is enough. Each element of a product is summed by one lane in ascending k: its value
// does not depend on the tile's size, on the blocking or on the number of threads.
#ifndef FEDSPINE_CSRC_GEMM_INL_H_
#define FEDSPINE_CSRC_GEMM_INL_H_

#include "packed_weight.h"
#include "simd.h"

namespace fedspine {
namespace FEDSPINE_TARGET {
namespace {

constexpr Index kTileColumns = kTileVectors * kLanes;
static_assert(kPanelWidth % kTileColumns == 0, "a tile must not straddle two panels");
constexpr Index kPrefetchSteps = 64;    // b is often read once: 8 KB ahead of the sum, in panels.
constexpr Index kCacheLineFloats = 16;  // 64 bytes.

// sum over k < depth of a[row][k] * b[k][column]; both may be null when depth is 0.
struct Product {
  const float* a;
  Index a_panel_stride;  // Floats from a panel of a to the next.
  const float* b;
  Index b_stride;  // Floats from b's row k to row k + 1.
  Index depth;
};

// out = scale * (init + main + extra) on one tile; `out` may be `init`.
struct Tile {
  Product main;
  Product extra;
  const float* init;  // Null for zero.
  Index init_stride;  // 0 repeats one row (a bias).
  float scale;
  float* out;
  Index out_stride;
  Index columns;  // At most the tile's vectors; memory beyond is neither read nor written.
};

// sum[row] += a_value(row) * b: one step of the depth.
template <int kRows, int kVectors, typename AValue>
FEDSPINE_INLINE void AccumulateStep(const float* b, const AValue& a_value,
                                    V (&sum)[kRows][kVectors]) {
  V b_row[kVectors];
  FEDSPINE_UNROLL(16)
  for (int v = 0; v < kVectors; ++v) b_row[v] = Load(b + v * kLanes);
  FEDSPINE_UNROLL(2)
  for (Index line = 0; line < kVectors * kLanes; line += kCacheLineFloats) {
    Prefetch(b + kPrefetchSteps * kPanelWidth + line);
  }
  FEDSPINE_UNROLL(16)
  for (int row = 0; row < kRows; ++row) {
    const V a_row = Broadcast(a_value(row));
    FEDSPINE_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) sum[row][v] = MultiplyAdd(a_row, b_row[v], sum[row][v]);
  }
}

template <int kRows, int kVectors>
FEDSPINE_INLINE void Accumulate(const Product& product, V (&sum)[kRows][kVectors]) {
  const float* a = product.a;
  const float* b = product.b;
  for (Index left = product.depth; left > 0; left -= kPanelWidth) {
    if (left > kPanelWidth) {  // The next panel is far away where a is a packed weight.
      FEDSPINE_UNROLL(16)
      for (int row = 0; row < kRows; ++row) {
        Prefetch(a + product.a_panel_stride + row * kPanelWidth);
        Prefetch(a + product.a_panel_stride + row * kPanelWidth + kPanelWidth / 2);
      }
    }
    const float* a_k = a;
    const float* const a_end = a + Min(left, kPanelWidth);
#if defined(__aarch64__)
    // FMLA takes a lane of a vector: one load of a row serves four steps.
    for (; a_end - a_k >= kLanes; a_k += kLanes) {
      V a_rows[kRows];
      FEDSPINE_UNROLL(16)
      for (int row = 0; row < kRows; ++row) a_rows[row] = Load(a_k + row * kPanelWidth);
      FEDSPINE_UNROLL(4)
      for (int lane = 0; lane < kLanes; ++lane, b += product.b_stride) {
        AccumulateStep(b, [&](int row) { return a_rows[row][lane]; }, sum);
      }
    }
#endif
    for (; a_k < a_end; ++a_k, b += product.b_stride) {
      AccumulateStep(b, [&](int row) { return a_k[row * kPanelWidth]; }, sum);
    }
    a += product.a_panel_stride;
  }
}

template <int kRows, int kVectors>
FEDSPINE_INLINE void Compute(const Tile& tile, V (&sum)[kRows][kVectors]) {
  const Index last = tile.columns - (kVectors - 1) * kLanes;  // Lanes of the last vector in use.
  FEDSPINE_UNROLL(16)
  for (int row = 0; row < kRows; ++row) {
    FEDSPINE_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) sum[row][v] = V{};
  }
  if (tile.init != nullptr) {
    FEDSPINE_UNROLL(16)
    for (int row = 0; row < kRows; ++row) {
      const float* from = tile.init + row * tile.init_stride;
      FEDSPINE_UNROLL(16)
      for (int v = 0; v + 1 < kVectors; ++v) sum[row][v] = Load(from + v * kLanes);
      from += (kVectors - 1) * kLanes;
      sum[row][kVectors - 1] = last == kLanes ? Load(from) : LoadFirst(from, last);
    }
  }
  Accumulate(tile.main, sum);
  Accumulate(tile.extra, sum);
  if (tile.scale != 1) {
    FEDSPINE_UNROLL(16)
    for (int row = 0; row < kRows; ++row) {
      FEDSPINE_UNROLL(16)
      for (int v = 0; v < kVectors; ++v) sum[row][v] *= Broadcast(tile.scale);
    }
  }
}

template <int kRows, int kVectors>
void ComputeTile(const Tile& tile) {
  V sum[kRows][kVectors];
  Compute(tile, sum);
  const Index last = tile.columns - (kVectors - 1) * kLanes;
  FEDSPINE_UNROLL(16)
  for (int row = 0; row < kRows; ++row) {
    float* to = tile.out + row * tile.out_stride;
    FEDSPINE_UNROLL(16)
    for (int v = 0; v + 1 < kVectors; ++v) Store(sum[row][v], to + v * kLanes);
    to += (kVectors - 1) * kLanes;
    if (last == kLanes) {
      Store(sum[row][kVectors - 1], to);
    } else {
      StoreFirst(sum[row][kVectors - 1], to, last);
    }
  }
}

// The same with out[column][row]; the columns of the tile are rows of `out`.
template <int kRows, int kVectors>
void ComputeTileTransposed(const Tile& tile) {
  V sum[kRows][kVectors];
  Compute(tile, sum);
  FEDSPINE_UNROLL(16)
  for (int v = 0; v < kVectors; ++v) {
    const Index columns = Min(kLanes, tile.columns - v * kLanes);
    FEDSPINE_UNROLL(16)
    for (int first = 0; first < kRows; first += kLanes) {
      V block[kLanes];
      FEDSPINE_UNROLL(16)
      for (int row = 0; row < kLanes; ++row) {
        block[row] = first + row < kRows ? sum[first + row < kRows ? first + row : 0][v] : V{};
      }
      Transpose(block);
      float* to = tile.out + v * kLanes * tile.out_stride + first;
      constexpr int kLeft = kRows;
      for (Index column = 0; column < columns; ++column, to += tile.out_stride) {
        if (kLeft - first >= kLanes) {
          Store(block[column], to);
        } else {
          StoreFirst(block[column], to, kLeft - first);
        }
      }
    }
  }
}

using TileFunction = void (*)(const Tile&);

template <bool kTransposed, int kRows, int kVectors>
constexpr TileFunction TileFor() {
  if constexpr (kTransposed) {
    return &ComputeTileTransposed<kRows, kVectors>;
  } else {
    return &ComputeTile<kRows, kVectors>;
  }
}

template <bool kTransposed, int kVectors, int... kRow>
struct TileRowTable {
  static constexpr TileFunction kFunctions[] = {TileFor<kTransposed, kRow, kVectors>()...};
};

template <bool kTransposed, int kVectors>
FEDSPINE_INLINE TileFunction FindTile(Index rows) {
#if FEDSPINE_LANES == 16
  return TileRowTable<kTransposed, kVectors, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
                      14>::kFunctions[rows - 1];
#else
  return TileRowTable<kTransposed, kVectors, 1, 2, 3, 4, 5, 6>::kFunctions[rows - 1];
#endif
}

// Computes a tile of 1..kTileRows rows and 1..kTileColumns columns.
template <bool kTransposed>
FEDSPINE_INLINE void RunTile(Index rows, const Tile& tile) {
  const Index vectors = (tile.columns + kLanes - 1) / kLanes;
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return FindTile<kTransposed, 4>(rows)(tile);
    if (vectors == 3) return FindTile<kTransposed, 3>(rows)(tile);
  }
  if (vectors == 2) return FindTile<kTransposed, 2>(rows)(tile);
  FindTile<kTransposed, 1>(rows)(tile);
}

// Nearly equal tiles of at most kTileRows rows: no thin last tile.
constexpr Index NumTiles(Index rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr Range TileRange(Index rows, Index tile) {
  return PartRange(rows, 1, tile, NumTiles(rows));
}

// out[column][row] = in[row][column].
FEDSPINE_INLINE void TransposeMatrix(const float* in, Index in_stride, Index rows, Index columns,
                                     float* out, Index out_stride) {
  for (Index row = 0; row < rows; row += kLanes) {
    const Index num_rows = Min(kLanes, rows - row);
    for (Index column = 0; column < columns; column += kLanes) {
      const Index num_columns = Min(kLanes, columns - column);
      const float* from = in + row * in_stride + column;
      float* to = out + column * out_stride + row;
      V block[kLanes];
      if (num_rows == kLanes && num_columns == kLanes) {
        FEDSPINE_UNROLL(16)
        for (Index i = 0; i < kLanes; ++i) block[i] = Load(from + i * in_stride);
        Transpose(block);
        FEDSPINE_UNROLL(16)
        for (Index i = 0; i < kLanes; ++i) Store(block[i], to + i * out_stride);
      } else {
        for (Index i = 0; i < kLanes; ++i) {
          block[i] = i < num_rows ? LoadFirst(from + i * in_stride, num_columns) : V{};
        }
        Transpose(block);
        for (Index i = 0; i < num_columns; ++i) StoreFirst(block[i], to + i * out_stride, num_rows);
      }
    }
  }
}

constexpr Index NumPanels(Index features) { return (features + kPanelWidth - 1) / kPanelWidth; }

// Panels of the transpose of in[rows, columns]: [rows / 32][columns][32], zeros beyond the last
// row.
inline void PackTransposed(const float* in, Index in_stride, Index rows, Index columns,
                           float* out) {
  for (Index row = 0; row < rows; row += kPanelWidth) {
    const Index num_rows = Min(kPanelWidth, rows - row);
    float* panel = out + row * columns;
    if (num_rows < kPanelWidth) {
      for (Index i = 0; i < columns * kPanelWidth; ++i) panel[i] = 0;
    }
    TransposeMatrix(in + row * in_stride, in_stride, num_rows, columns, panel, kPanelWidth);
  }
}

// Copies in[rows, columns], row by row; the strides are in floats.
inline void CopyMatrix(const float* in, Index in_stride, Index rows, Index columns, float* out,
                       Index out_stride) {
  for (Index row = 0; row < rows; ++row, in += in_stride, out += out_stride) {
    Index column = 0;
    for (; column + kLanes <= columns; column += kLanes) Store(Load(in + column), out + column);
    if (column < columns)
      StoreFirst(LoadFirst(in + column, columns - column), out + column, columns - column);
  }
}

}  // namespace
}  // namespace FEDSPINE_TARGET
}  // namespace fedspine

#endif  // FEDSPINE_CSRC_GEMM_INL_H_
