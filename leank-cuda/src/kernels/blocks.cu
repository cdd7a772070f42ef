// Writes blocks: new tokens (`append`), kept channels of blocks that become lean (`pack`), copies of
// shared blocks (`copy`).

// What lane `lane` has of a tile: element `i` of 8 is at this row and column.
__device__ __forceinline__ u32 row_of(u32 lane, u32 i) { return lane / 4 + i / 2 % 2 * 8; }

__device__ __forceinline__ u32 column_of(u32 lane, u32 i) {
    return lane % 4 * 2 + i % 2 + i / 4 * 8;
}

// Where the slices of a head lie in a block.
__device__ __forceinline__ u64 head_address(
    const Blocks& blocks, u64 entry, const Head& head, u32 head_index
) {
    u32 offset = is_lean(entry) ? head.offset : head_index * blocks.full_head;
    return address(blocks, entry) + offset;
}

// Eight elements as they lie in memory.
union Unit {
    u16 elements[8];
    uint4 all;
};

// ---- New tokens -------------------------------------------------------------------------------

struct Append {
    Blocks blocks;
    // Their `before` counts slices.
    const Sequence* sequences;
    const u64* tables;
    const Head* heads;
    const u16* channels;
    View k;
    View v;
    u32 sequence_count;
    u32 head_dim;
};

constexpr u32 WIDTH = NV * TILE;
constexpr u32 APPEND_THREADS = 128;

struct Rows {
    // Padded, so that rows start in other banks.
    u16 k[TILE][WIDTH + 8];
    u16 v[TILE][WIDTH + 8];
};

template <u32 DTYPE>
__device__ __forceinline__ void read_elements(
    const View& view, u64 first, u32 from, u32 to, u32 head_dim, u16 (*rows)[WIDTH + 8]
) {
#pragma unroll 4
    for (u32 i = threadIdx.x; i < (to - from) * WIDTH; i += APPEND_THREADS) {
        u32 row = i / WIDTH, channel = i % WIDTH;
        // Always a load, and never one behind the row.
        u64 index = first + row * view.token_stride + min(channel, head_dim - 1);
        u16 x = load_stored<DTYPE>(view, index);
        rows[from + row][channel] = channel < head_dim ? x : u16(0);
    }
}

// Rows `from..to` of the slice, channels from head_dim on 0.
__device__ __forceinline__ void read_rows(
    const View& view, u64 first, u32 from, u32 to, u32 head_dim, u16 (*rows)[WIDTH + 8]
) {
    if (view.aligned && view.dtype == (BF16 ? B16 : F16) && head_dim % 8 == 0) {
        u32 units = WIDTH / 8;
        for (u32 i = threadIdx.x; i < (to - from) * units; i += APPEND_THREADS) {
            u32 row = i / units, channel = i % units * 8;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (channel < head_dim) {
                u64 index = first + row * view.token_stride + channel;
                x = *(const uint4*)((const u16*)view.data + index);
            }
            *(uint4*)&rows[from + row][channel] = x;
        }
        return;
    }
    if (view.dtype == F32) {
        read_elements<F32>(view, first, from, to, head_dim, rows);
    } else if (view.dtype == F16) {
        read_elements<F16>(view, first, from, to, head_dim, rows);
    } else {
        read_elements<B16>(view, first, from, to, head_dim, rows);
    }
}

// One slice of one KV head per thread block.
extern "C" __global__ void __launch_bounds__(APPEND_THREADS, 8)
append(const __grid_constant__ Append args) {
    __shared__ alignas(16) Rows rows;
    const Blocks& blocks = args.blocks;
    u32 head_index = blockIdx.y;
    u32 which = find_sequence(args.sequences, args.sequence_count, blockIdx.x);
    const Sequence sequence = args.sequences[which];
    u32 slice = sequence.start / blocks.block * blocks.slices +
                sequence.start % blocks.block / TILE + blockIdx.x - sequence.before;
    u32 index = slice / blocks.slices;
    u32 within = slice - index * blocks.slices;
    u32 position = index * blocks.block + within * TILE;
    u32 end = min(sequence.start + sequence.tokens, position + min(TILE, blocks.block - within * TILE));
    // More thread blocks may be launched than there are slices.
    if (position >= sequence.start + sequence.tokens) return;
    u32 from = max(position, sequence.start) - position;
    u32 to = end - position;

    u64 entry = args.tables[sequence.table + index];
    bool lean = is_lean(entry);
    const Head head = args.heads[head_index];
    if (lean && head.kept == 0) return;
    u64 row = sequence.row + position + from - sequence.start;
    read_rows(
        args.k, row * args.k.token_stride + head_index * args.k.head_stride, from, to,
        args.head_dim, rows.k
    );
    read_rows(
        args.v, row * args.v.token_stride + head_index * args.v.head_stride, from, to,
        args.head_dim, rows.v
    );
    __syncthreads();

    u32 k_tiles = lean ? head.tiles : NV;
    u32 slice_bytes = (k_tiles + NV) * TILE_BYTES;
    u64 target = head_address(blocks, entry, head, head_index) + u64(within) * slice_bytes;
    for (u32 unit = threadIdx.x; unit < (k_tiles + NV) * 32; unit += APPEND_THREADS) {
        u32 tile = unit / 32, lane = unit % 32;
        bool is_k = tile < k_tiles;
        Unit x;
        u32 tokens[8];
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            u32 r = row_of(lane, i), c = column_of(lane, i);
            if (is_k) {
                tokens[i] = r;
                u32 channel = tile * TILE + c;
                u16 element = 0;
                if (!lean) {
                    element = rows.k[r][channel];
                } else if (channel < head.kept) {
                    element = rows.k[r][args.channels[head.channels + channel]];
                }
                x.elements[i] = element;
            } else {
                tokens[i] = c;
                x.elements[i] = rows.v[c][(tile - k_tiles) * TILE + r];
            }
        }
        u16* to_memory = (u16*)target + unit * 8;
        if (from == 0 && to == TILE) {
            *(uint4*)to_memory = x.all;
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                if (tokens[i] >= from && tokens[i] < to) to_memory[i] = x.elements[i];
            }
        }
    }
}

// ---- Whole blocks -----------------------------------------------------------------------------

struct Pair {
    u64 from;
    u64 to;
};

struct Move {
    // Of every layer.
    const Blocks* layers;
    const Pair* pairs;
    // [layers, KV heads]
    const Head* heads;
    const u16* channels;
    u32 kv_heads;
};

static_assert(sizeof(Append) == 144, "the host counts otherwise");
static_assert(sizeof(Move) == 40, "the host counts otherwise");
static_assert(sizeof(Pair) == 16, "the host counts otherwise");

constexpr u32 MOVE_THREADS = 256;

// Full blocks to lean ones. Grid: [pairs, KV heads, layers].
extern "C" __global__ void __launch_bounds__(MOVE_THREADS) pack(const __grid_constant__ Move args) {
    const Blocks blocks = args.layers[blockIdx.z];
    const Head head = args.heads[blockIdx.z * args.kv_heads + blockIdx.y];
    if (head.kept == 0) return;
    const Pair pair = args.pairs[blockIdx.x];
    const u16* from = (const u16*)head_address(blocks, pair.from, head, blockIdx.y);
    uint4* to = (uint4*)head_address(blocks, pair.to, head, blockIdx.y);
    u32 tiles = head.tiles + NV;
    for (u32 unit = threadIdx.x; unit < blocks.slices * tiles * 32; unit += MOVE_THREADS) {
        u32 slice = unit / (tiles * 32), tile = unit / 32 % tiles, lane = unit % 32;
        const u16* source = from + slice * (FULL_SLICE / 2);
        Unit x;
        if (tile >= head.tiles) {
            x.all = *(const uint4*)(source + ((tile - head.tiles + NV) * 32 + lane) * 8);
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                u32 place = tile * TILE + column_of(lane, i);
                u16 element = 0;
                if (place < head.kept) {
                    u32 channel = args.channels[head.channels + place];
                    u32 at = in_tile(row_of(lane, i), channel % TILE);
                    element = source[channel / TILE * (TILE * TILE) + at];
                }
                x.elements[i] = element;
            }
        }
        to[unit] = x.all;
    }
}

// Full blocks to full ones. Grid: [pairs, KV heads, layers].
extern "C" __global__ void __launch_bounds__(MOVE_THREADS) copy(const __grid_constant__ Move args) {
    const Blocks blocks = args.layers[blockIdx.z];
    const Pair pair = args.pairs[blockIdx.x];
    u64 offset = u64(blockIdx.y) * blocks.full_head;
    const uint4* from = (const uint4*)(address(blocks, pair.from) + offset);
    uint4* to = (uint4*)(address(blocks, pair.to) + offset);
    for (u32 i = threadIdx.x; i < blocks.full_head / 16; i += MOVE_THREADS) to[i] = from[i];
}
