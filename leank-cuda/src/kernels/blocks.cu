// Writes blocks: new tokens (`append`), kept channels of blocks that become lean, as they are or as codes
// (`pack`), copies of shared blocks (`copy`).

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

constexpr u32 WIDTH = NV * TILE;

// Eight elements as they lie in memory.
union Unit {
    u16 elements[8];
    uint4 all;
};

#if CODED

// ---- Codes ------------------------------------------------------------------------------------

// leank_core::quant's, operation by operation: none may be fused with another.

// Of a group with an infinity or NaN.
constexpr u32 NAN_SCALE = 0x7fc0;

__device__ __forceinline__ float nearest(float x) {
    return __fsub_rn(__fadd_rn(x, 12582912.0f), 12582912.0f);
}

// The values of a group.
struct Range {
    float least = __int_as_float(0x7f800000);
    float largest = -__int_as_float(0x7f800000);
    bool finite = true;

    __device__ __forceinline__ void take(u16 element) {
        float x = low_of<BF16>(element);
        least = fminf(least, x);
        largest = fmaxf(largest, x);
        finite &= fabsf(x) < __int_as_float(0x7f800000);
    }

    // Step and zero.
    __device__ __forceinline__ u32 scale(u32 kind) const {
        if (!finite) return NAN_SCALE;
        constexpr float LARGEST = 8.507059173023462e37f, LEAST_STEP = 1.1754943508222875e-38f;
        float low = fminf(fmaxf(least, -LARGEST), LARGEST);
        float high = fminf(fmaxf(largest, -LARGEST), LARGEST);
        float magnitude = fmaxf(fabsf(low), fabsf(high));
        if (kind == FP8) {
            float step = fmaxf(__fdiv_rn(magnitude, 448.0f), LEAST_STEP);
            return (__float_as_uint(step) + 0xffff) >> 16;
        }
        float step = __fdiv_rn(__fsub_rn(high, low), kind == INT4 ? 15.0f : 255.0f);
        step = fmaxf(step, __fdiv_rn(magnitude, 32767.0f));
        u32 bits = (__float_as_uint(fmaxf(step, LEAST_STEP)) + 0xffff) >> 16;
        float inverse = __fdiv_rn(1.0f, __uint_as_float(bits << 16));
        return bits | u32(int(nearest(__fmul_rn(low, inverse)))) << 16;
    }
};

// The nearest e4m3, at most 448.
__device__ __forceinline__ u32 to_e4m3(float x) {
    u32 bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
    u32 code = u32(nearest(__fmul_rn(fabsf(x), 512.0f)));
    if (magnitude >= 121 << 23) {
        code = min(((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3), 0x7eu);
    }
    return bits >> 24 & 0x80 | code;
}

__device__ __forceinline__ u32 code_of(u16 element, u32 scale, u32 kind) {
    if ((scale & 0xffff) == NAN_SCALE) return 0;
    float inverse = __fdiv_rn(1.0f, __uint_as_float(scale << 16));
    float scaled = __fmul_rn(low_of<BF16>(element), inverse);
    if (kind == FP8) return to_e4m3(scaled);
    float zero = float(int(scale) >> 16);
    float code = fmaxf(__fsub_rn(nearest(scaled), zero), 0.0f);
    return u32(fminf(code, kind == INT4 ? 15.0f : 255.0f));
}

// Puts a lane's code into its words.
__device__ __forceinline__ void put_code(u32 (&words)[2], u32 i, u32 code, u32 kind) {
    u32 bit = i / 2 % 2 * 8 + i % 2 * 16;
    if (kind == INT4) {
        words[0] |= code << (bit + i / 4 * 4);
    } else {
        words[i / 4] |= code << bit;
    }
}

// Where the step of a channel or token lies among those of 16; its zero lies 4 further.
__device__ __forceinline__ u32 in_scales(u32 i) { return i % 8 / 2 * 8 + i / 8 * 2 + i % 2; }

__device__ __forceinline__ void put_scale(u16* scales, u32 i, u32 scale) {
    int zero = int(scale) >> 16;
    scales[in_scales(i)] = u16(scale);
    scales[in_scales(i) + 4] = u16(zero < 0 ? 0x8000 - zero : zero);
}

__device__ __forceinline__ u32 get_scale(const u16* scales, u32 i) {
    int zero = scales[in_scales(i) + 4];
    if (zero >= 0x8000) zero = 0x8000 - zero;
    return scales[in_scales(i)] | u32(zero) << 16;
}

// Writes a head that has codes, by all threads of a block. `source` has the elements of the whole block
// by token and channel, and zeros for V's channels from head_dim on.
template <class Source>
__device__ __forceinline__ void
encode(const Source& source, u64 target, const Head& head, const Blocks& blocks, u32 head_dim, const u16* kept) {
    u8* slices = (u8*)target + scale_bytes(head);
    u32 slice_bytes = lean_slice_bytes(head), k_bytes = lean_k_bytes(head);
    u32 scales_at = k_bytes + NV * words_of(head.v_codes) * CODE_BYTES;
    u32 groups = groups_of(head), width = head.v_codes == INT4 ? GROUP_TILES * TILE : WIDTH;

    // Scales; of what is not there, 0.
    u32 k_scales = head.k_codes == PLAIN ? 0 : head.tiles * TILE;
    for (u32 place = threadIdx.x; place < k_scales; place += blockDim.x) {
        u32 scale = 0;
        if (place < head.kept) {
            Range range;
#pragma unroll 8
            for (u32 token = 0; token < blocks.block; token++) {
                range.take(source.k(token, kept[place]));
            }
            scale = range.scale(head.k_codes);
        }
        put_scale((u16*)(target + place / TILE * SCALE_BYTES), place % TILE, scale);
    }
    u32 v_scales = head.v_codes == PLAIN ? 0 : blocks.slices * TILE * groups;
    for (u32 i = threadIdx.x; i < v_scales; i += blockDim.x) {
        u32 token = i / groups, group = i % groups;
        u32 scale = 0;
        u32 begin = group * width, end = min(begin + width, head_dim);
        if (token < blocks.block && begin < end) {
            Range range;
#pragma unroll 8
            for (u32 channel = begin; channel < end; channel++) range.take(source.v(token, channel));
            scale = range.scale(head.v_codes);
        }
        u8* to = slices + token / TILE * slice_bytes + scales_at + group * SCALE_BYTES;
        put_scale((u16*)to, token % TILE, scale);
    }
    __syncthreads();

    for (u32 unit = threadIdx.x; unit < blocks.slices * (head.tiles + NV) * 32; unit += blockDim.x) {
        u32 lane = unit % 32, tile = unit / 32 % (head.tiles + NV);
        u32 slice = unit / 32 / (head.tiles + NV);
        u8* to = slices + slice * slice_bytes;
        bool is_k = tile < head.tiles;
        if (!is_k) tile -= head.tiles;
        u32 kind = is_k ? head.k_codes : head.v_codes;
        Unit x;
        u32 words[2] = {0, 0};
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            u32 r = row_of(lane, i), c = column_of(lane, i);
            u32 token = slice * TILE + (is_k ? r : c), place = tile * TILE + (is_k ? c : r);
            u16 element = 0;
            if (token < blocks.block && (!is_k || place < head.kept)) {
                element = is_k ? source.k(token, kept[place]) : source.v(token, place);
            }
            x.elements[i] = element;
            if (kind != PLAIN) {
                u32 group = head.v_codes == INT4 ? tile / GROUP_TILES : 0;
                const u8* scales = is_k ? (const u8*)target + tile * SCALE_BYTES
                                        : to + scales_at + group * SCALE_BYTES;
                u32 scale = get_scale((const u16*)scales, c);
                bool is_there = token < blocks.block && place < (is_k ? head.kept : head_dim);
                u32 code = code_of(element, scale, kind);
                put_code(words, i, is_there ? code : 0, kind);
            }
        }
        if (!is_k) to += k_bytes;
        if (kind == PLAIN) {
            *(uint4*)(to + tile * TILE_BYTES + lane * 16) = x.all;
        } else if (kind == INT4) {
            *(u32*)(to + tile * CODE_BYTES + lane * 4) = words[0];
        } else {
            *(uint2*)(to + tile * 2 * CODE_BYTES + lane * 8) = make_uint2(words[0], words[1]);
        }
    }
}

#endif

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

#if CODED

// New tokens of one head.
struct NewTokens {
    const Append& args;
    u64 k_row;
    u64 v_row;

    static __device__ __forceinline__ u16 read(const View& view, u64 index) {
        if (view.dtype == F32) return load_stored<F32>(view, index);
        return view.dtype == F16 ? load_stored<F16>(view, index) : load_stored<B16>(view, index);
    }

    __device__ __forceinline__ u16 k(u32 token, u32 channel) const {
        return read(args.k, k_row + token * args.k.token_stride + channel);
    }

    __device__ __forceinline__ u16 v(u32 token, u32 channel) const {
        if (channel >= args.head_dim) return 0;
        return read(args.v, v_row + token * args.v.token_stride + channel);
    }
};

#endif

// One slice of one KV head per thread block; of heads that have codes one block, whose tokens are all
// new where it is lean.
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
#if CODED
    if (lean && is_coded(head)) {
        if (within != 0) return;
        NewTokens tokens{
            args, row * args.k.token_stride + head_index * args.k.head_stride,
            row * args.v.token_stride + head_index * args.v.head_stride
        };
        u64 target = head_address(blocks, entry, head, head_index);
        encode(tokens, target, head, blocks, args.head_dim, args.channels + head.channels);
        return;
    }
#endif
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
    u32 head_dim;
};

static_assert(sizeof(Append) == 144, "the host counts otherwise");
static_assert(sizeof(Move) == 40, "the host counts otherwise");
static_assert(sizeof(Pair) == 16, "the host counts otherwise");

constexpr u32 MOVE_THREADS = 256;

#if CODED

// A head of a full block.
struct Whole {
    const u16* elements;

    __device__ __forceinline__ const u16* slice(u32 token) const {
        return elements + token / TILE * (FULL_SLICE / 2);
    }

    __device__ __forceinline__ u16 k(u32 token, u32 channel) const {
        u32 at = in_tile(token % TILE, channel % TILE);
        return slice(token)[channel / TILE * (TILE * TILE) + at];
    }

    __device__ __forceinline__ u16 v(u32 token, u32 channel) const {
        u32 at = in_tile(channel % TILE, token % TILE);
        return slice(token)[(NV + channel / TILE) * (TILE * TILE) + at];
    }
};

#endif

// Full blocks to lean ones. Grid: [pairs, KV heads, layers].
extern "C" __global__ void __launch_bounds__(MOVE_THREADS, 4) pack(const __grid_constant__ Move args) {
    const Blocks blocks = args.layers[blockIdx.z];
    const Head head = args.heads[blockIdx.z * args.kv_heads + blockIdx.y];
    if (head.kept == 0) return;
    const Pair pair = args.pairs[blockIdx.x];
    const u16* from = (const u16*)head_address(blocks, pair.from, head, blockIdx.y);
    uint4* to = (uint4*)head_address(blocks, pair.to, head, blockIdx.y);
#if CODED
    if (is_coded(head)) {
        const u16* kept = args.channels + head.channels;
        encode(Whole{from}, u64(to), head, blocks, args.head_dim, kept);
        return;
    }
#endif
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
