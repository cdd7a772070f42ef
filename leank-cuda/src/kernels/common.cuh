// What all kernels share: number types, storage elements, tiles, the tables of a step.
//
// Constants from the host: NV (tiles across head_dim), BF16 (storage is bfloat16, otherwise f16), CODED
// (lean blocks of some head hold codes).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- Tiles ----------------------------------------------------------------------------------
//
// K and V lie in tiles of 16 x 16 elements, in the order in which the lanes of a warp hold the
// A operand of mma.m16n8k16: lane l has elements 8l..8l+8, 16 bytes. Rows of a K tile are tokens
// and its columns channels; rows of a V tile are channels and its columns tokens.
//
// A slice is what a block holds of 16 tokens of one head: the tiles of K, then those of V. The
// slices of a head follow one another, and the heads of a block do.
//
// Codes (leank_core::quant) lie in tiles too. A lane has one word of a tile of 4-bit codes, and two of
// a tile of 8-bit codes: with some bits masked, a word or one shifted by 8 is two codes as the lower bits of
// 16. The code of the lane's element i begins at bit i / 2 % 2 * 8 + i % 2 * 16, of 4 bits from i = 4 on
// 4 further, of 8 bits from i = 4 on in the second word.
//
// Scales lie 16 by 16, in the order of the lanes that want them: for each l of 0..4 the steps of channels
// (K) or tokens (V) 2 l, 2 l + 1, 2 l + 8 and 2 l + 9, then their zeros. Zeros are sign and magnitude. K's,
// one per channel, come before the slices of their head; V's behind the tiles of their slice, one group of
// channels after the other. Zeros of fp8 are 0.

constexpr u32 TILE = 16;
constexpr u32 TILE_BYTES = TILE * TILE * 2;
constexpr u32 FULL_SLICE = 2 * NV * TILE_BYTES;
// A tile of 4-bit codes, 16 scales.
constexpr u32 CODE_BYTES = TILE * TILE / 2;
constexpr u32 SCALE_BYTES = 64;
// Tiles of V that share scales in 4 bits, and groups of so many.
constexpr u32 GROUP_TILES = 2;
constexpr u32 GROUPS = (NV + GROUP_TILES - 1) / GROUP_TILES;

// Index of an element in its tile.
__device__ __forceinline__ u32 in_tile(u32 row, u32 column) {
    return ((row % 8) * 4 + column % 8 / 2) * 8 + (row / 8 + column / 8 * 2) * 2 + column % 2;
}

// ---- Elements -------------------------------------------------------------------------------

__device__ __forceinline__ float half_to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ __forceinline__ float bfloat_to_float(u16 x) { return __uint_as_float(u32(x) << 16); }

__device__ __forceinline__ u16 float_to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u16 float_to_bfloat(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u16 float_to_stored(float x) {
    return BF16 ? float_to_bfloat(x) : float_to_half(x);
}

// Two elements, bfloat16 where `BRAIN`, or f16; `low` has the lower address.
template <bool BRAIN>
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    if constexpr (BRAIN) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    }
    return y;
}

template <bool BRAIN>
__device__ __forceinline__ float low_of(u32 x) {
    return BRAIN ? __uint_as_float(x << 16) : half_to_float(u16(x));
}

template <bool BRAIN>
__device__ __forceinline__ float high_of(u32 x) {
    return BRAIN ? __uint_as_float(x & 0xffff0000u) : half_to_float(u16(x >> 16));
}

// ---- Activations ----------------------------------------------------------------------------

enum : u32 { F32 = 0, F16 = 1, B16 = 2 };

// [tokens, heads, head_dim], strides in elements.
struct View {
    u64 data;
    u64 token_stride;
    u64 head_stride;
    u32 dtype;
    // Every row starts at a multiple of 16 bytes.
    u32 aligned;
};

// One element as it is stored. The type is known at compile time: a branch per element would have
// each load wait for the one before.
template <u32 DTYPE>
__device__ __forceinline__ u16 load_stored(const View& view, u64 index) {
    if constexpr (DTYPE == F32) {
        return float_to_stored(((const float*)view.data)[index]);
    } else {
        u16 x = ((const u16*)view.data)[index];
        if constexpr (DTYPE == (BF16 ? B16 : F16)) return x;
        return float_to_stored(DTYPE == B16 ? bfloat_to_float(x) : half_to_float(x));
    }
}

__device__ __forceinline__ void store(const View& view, u64 index, float x) {
    if (view.dtype == F32) {
        ((float*)view.data)[index] = x;
    } else {
        ((u16*)view.data)[index] = view.dtype == B16 ? float_to_bfloat(x) : float_to_half(x);
    }
}

// ---- Tables of a step -----------------------------------------------------------------------

// A sequence of the step.
struct Sequence {
    // Index of its block table in the tables of the step.
    u32 table;
    // Position of its first new token.
    u32 start;
    // New tokens.
    u32 tokens;
    // Row of its first new token in the step.
    u32 row;
    // Lean blocks: indices in its block table.
    u32 lean_begin;
    u32 lean_end;
    // Of the sequences before it in the same list: items (attention) or slices (append).
    u32 before;
    // Items per KV head.
    u32 tiles;
};

// Index of the sequence that number `wanted` of the list's items or slices belongs to.
__device__ __forceinline__ u32 find_sequence(const Sequence* sequences, u32 count, u32 wanted) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (sequences[middle].before <= wanted) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

enum : u32 { PLAIN = 0, INT4 = 1, INT8 = 2, FP8 = 3 };

// Words per lane of a tile of codes.
__device__ __forceinline__ constexpr u32 words_of(u32 codes) { return codes < INT8 ? codes : 2; }

// A KV head of one layer in lean blocks.
struct Head {
    // Byte offset in a lean block.
    u32 offset;
    // Kept channels; 0: dead, nothing is stored.
    u16 kept;
    // How K and V are stored: `PLAIN` or a kind of codes.
    u8 k_codes;
    u8 v_codes;
    // Tiles of K across the kept channels.
    u16 tiles;
    // Slices that are read together.
    u16 unit;
    // Index of its first kept channel in the list of all, which has room for all channels of a head.
    u32 channels;
};

// Where the blocks of one layer lie. A run holds 2^n blocks, layer by layer. A table entry says
// which block: whether it is lean (bit 63), n (bits 58 to 62), the address of the run, a multiple of
// 65536 (bits 16 to 57), and the number of the block in it.
struct Blocks {
    // Bytes of the layers before this one: full, lean.
    u64 layer_offset[2];
    // Bytes of a block in this layer: full, lean.
    u32 bytes[2];
    // Bytes of a head in a full block.
    u32 full_head;
    // Tokens per block, slices per block.
    u32 block;
    u32 slices;
};

__device__ __forceinline__ bool is_lean(u64 entry) { return entry >> 63; }

__device__ __forceinline__ u64 address(const Blocks& blocks, u64 entry) {
    u64 offset = is_lean(entry) ? blocks.layer_offset[1] : blocks.layer_offset[0];
    u32 bytes = is_lean(entry) ? blocks.bytes[1] : blocks.bytes[0];
    return (entry & 0x03ffffffffff0000ull) + (offset << (entry >> 58 & 31)) +
           (entry & 0xffff) * bytes;
}

__device__ __forceinline__ bool is_coded(const Head& head) {
    return CODED && (head.k_codes | head.v_codes) != PLAIN;
}

__device__ __forceinline__ u32 unit_of(const Head& head) { return CODED ? head.unit : 1; }

// Bytes of K's scales, before the slices.
__device__ __forceinline__ u32 scale_bytes(const Head& head) {
    return CODED && head.k_codes != PLAIN ? head.tiles * SCALE_BYTES : 0;
}

// Bytes of K in a slice.
__device__ __forceinline__ u32 lean_k_bytes(const Head& head) {
    bool coded = CODED && head.k_codes != PLAIN;
    return head.tiles * (coded ? words_of(head.k_codes) * CODE_BYTES : TILE_BYTES);
}

// Groups of V's channels that have scales.
__device__ __forceinline__ u32 groups_of(const Head& head) { return head.v_codes == INT4 ? GROUPS : 1; }

__device__ __forceinline__ u32 lean_slice_bytes(const Head& head) {
    u32 v = NV * TILE_BYTES;
    if (CODED && head.v_codes != PLAIN) {
        v = NV * words_of(head.v_codes) * CODE_BYTES + groups_of(head) * SCALE_BYTES;
    }
    return lean_k_bytes(head) + v;
}

// Bytes that are read together.
__device__ __forceinline__ u32 lean_unit_bytes(const Head& head) {
    return scale_bytes(head) + unit_of(head) * lean_slice_bytes(head);
}

// ---- Work -----------------------------------------------------------------------------------

// What is read of one item, in order: slices, and of lean blocks with codes units of several.
struct Extent {
    // Full ones before the lean ones, lean ones, all.
    u32 sink;
    u32 lean;
    u32 total;
    // Slices of lean blocks beyond the number of what is read: all those of a dead head.
    u32 skipped;

    // The first slice of number `own`, of all that the sequence has.
    __device__ __forceinline__ u32 slice(u32 own, const Head& head) const {
        if (own < sink) return own;
        if (CODED && own - sink < lean) return sink + (own - sink) * unit_of(head);
        return own + skipped;
    }
};

// A worker's first slice, with all that it needs to begin. Workers walk over items (sequence, KV
// head, tile of query rows) in order of their numbers, from their own start to that of the next
// worker. No two workers that have work start at the same slice.
struct Start {
    u32 item;
    u32 slice;
    u32 sequence;
    u32 head;
    u32 tile;
    // Workers that have slices of the item, and the number of this one among them.
    u32 sharers;
    u32 turn;
    u32 reserved;
    Sequence its_sequence;
    Head its_head;
    Extent its_extent;
};

static_assert(sizeof(View) == 32, "the host counts otherwise");
static_assert(sizeof(Sequence) == 32, "the host counts otherwise");
static_assert(sizeof(Head) == 16, "the host counts otherwise");
static_assert(sizeof(Blocks) == 40, "the host counts otherwise");
static_assert(sizeof(Start) == 96, "the host counts otherwise");

// `rows` query rows per tile, `group` query heads per KV head.
__device__ __forceinline__ Extent extent(
    const Sequence& sequence, const Head& head, u32 tile, u32 rows, u32 group, u32 block, u32 slices
) {
    u32 all_rows = sequence.tokens * group;
    u32 last_row = min((tile + 1) * rows, all_rows) - 1;
    u32 seen = sequence.start + last_row / group + 1;
    u32 blocks = (seen + block - 1) / block;
    u32 rest = seen - (blocks - 1) * block;
    u32 count = (blocks - 1) * slices + (rest + TILE - 1) / TILE;
    u32 begin = min(sequence.lean_begin, blocks);
    u32 end = max(begin, min(sequence.lean_end, blocks));
    u32 lean = (end - begin) * slices;
    u32 units = head.kept == 0 ? 0 : lean / unit_of(head);
    u32 skipped = lean - units;
    return Extent{begin * slices, units, count - skipped, skipped};
}
