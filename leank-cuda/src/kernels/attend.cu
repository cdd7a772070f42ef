// Decode attention over full and lean blocks: one launch for all sequences and KV heads of a layer.
//
// Work. Items (sequence, KV head, tile of query rows) lie one behind the other; `cut` gave every
// worker (a thread block, one per multiprocessor) a stretch of the same number of bytes. Where an
// item is shared by workers, each leaves its result to one before it; the first has all in the end.
// Who merges what does not depend on who was faster, and so results do not.
//
// A worker's warps take its slices in turn, each through a ring of its own in shared memory that
// is filled as far ahead as it is long, across items: while warps merge, memory stays busy. Per
// slice a warp computes S = K q (rows are tokens, columns query rows), the online softmax, and
// O += V^T P. K and V come from memory as the operands of mma, so nothing is rearranged; P becomes
// an operand by a transposition of 8 x 8 elements between lanes.
//
// Codes are operands as they lie, but for a mask: a bfloat16 of up to 8 bits is these bits times 2^-133 (of
// fp8, whose sign has to move, 2^-120 times the number).
// K's steps go into the queries and V's into the weights, once for all that share them, and what they are
// multiplied with is 2^64 (2^51) times what it stands for; so products are 2^-69 of what they stand for, and sums
// that codes go to stay so until their end. Zeros are operands too: what they add is one number per query
// row, and per group of V's channels. A warp takes several slices of a block at once, a unit, so that there
// is little to do for each.
//
// Constants from the host: NV, BF16, CODED, CAP (logits have a soft-cap), NT (tiles of 8 query rows), WARPS,
// STAGES, SHARED_BYTES.

constexpr u32 ROWS = 8 * NT;
constexpr u32 WIDTH = NV * TILE;
// Floats from one query row to the next in `sums`: rows start in other banks.
constexpr u32 PITCH = WIDTH + 4;
// Warps whose sums there is room for at once.
constexpr u32 SUM_WARPS = WARPS > 8 ? WARPS / 2 : WARPS;
constexpr u32 ALL = 0xffffffff;
#define NONE (-__int_as_float(0x7f800000))
// Logits may exceed the maximum that weights are relative to by so much (base 2) before it moves:
// moving it rescales the sums.
constexpr float SLACK = 8;

struct Attend {
    Blocks blocks;
    const Sequence* sequences;
    const u64* tables;
    const Start* starts;
    const Head* heads;
    const u16* channels;
    View q;
    View out;
    // What workers leave for others, [workers, ROWS, WIDTH / 4]: sums, and beside each four of them
    // maximum and sum of weights. `ABSENT` where there is nothing, which between launches is
    // everywhere.
    float4* partial;
    float2* partial_weight;
    u32 workers;
    u32 kv_heads;
    u32 group;
    u32 head_dim;
    // Scale times log2(e), cap times log2(e).
    float scale;
    float cap;
    float inverse_cap;
};

struct Shared {
    alignas(128) u8 ring[WARPS][STAGES][FULL_SLICE];
    union {
        // At the end of an item.
        alignas(16) float sums[SUM_WARPS][8][PITCH];
        // While its slices are read.
        struct {
            // As stored; rows and channels that are not there are 0.
            u16 q[ROWS][WIDTH + 2];
            // Kept channels, then 0.
            alignas(4) u16 kept[WIDTH];
        };
    };
    // Maximum and sum of weights of each query row.
    float2 weights[WARPS][8];
    u64 filled[WARPS][STAGES];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host counts otherwise");
static_assert(sizeof(Attend) == 192, "the host counts otherwise");

// ---- Copies into the ring -------------------------------------------------------------------

// What goes to a stage of a ring.
struct Piece {
    u64 from;
    u32 bytes;
#if CODED
    // Scales, which come before the rest.
    u64 scales;
    u32 scale_bytes;
#endif
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return u32(__cvta_generic_to_shared(pointer));
}

#if __CUDA_ARCH__ >= 900

// One lane asks the copy engine for a whole slice; the barrier counts its bytes.
struct Ring {
    static __device__ __forceinline__ void init(u64* filled) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(filled)));
    }

    static __device__ __forceinline__ void publish() {
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }

    static __device__ __forceinline__ void copy(u32 to, u64 from, u32 bytes, u32 barrier) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
            ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
            : "memory"
        );
    }

    static __device__ __forceinline__ void
    fill(u8* to, const Piece& piece, u64* filled, u32 owner, u32 lane) {
        if (lane != owner) return;
        u32 barrier = shared_address(filled), target = shared_address(to), bytes = piece.bytes;
#if CODED
        bytes += piece.scale_bytes;
#endif
        asm volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
            : "memory"
        );
#if CODED
        if (piece.scale_bytes != 0) copy(target, piece.scales, piece.scale_bytes, barrier);
        target += piece.scale_bytes;
#endif
        copy(target, piece.from, piece.bytes, barrier);
    }

    static __device__ __forceinline__ void skip() {}

    static __device__ __forceinline__ void wait(u64* filled, u32 round) {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "}\n" ::"r"(shared_address(filled)), "r"(round & 1)
            : "memory"
        );
    }
};

#else

// Every lane copies 16 bytes at a time; groups of copies end in the order in which they began.
struct Ring {
    static __device__ __forceinline__ void init(u64*) {}
    static __device__ __forceinline__ void publish() {}

    static __device__ __forceinline__ void copy(u8* to, u64 from, u32 bytes, u32 owner, u32 lane) {
        from = __shfl_sync(ALL, from, owner);
        for (u32 at = lane * 16; at < bytes; at += 512) {
            asm volatile(
                "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + at)),
                "l"(from + at)
                : "memory"
            );
        }
    }

    static __device__ __forceinline__ void
    fill(u8* to, const Piece& piece, u64*, u32 owner, u32 lane) {
#if CODED
        u32 scale_bytes = __shfl_sync(ALL, piece.scale_bytes, owner);
        copy(to, piece.scales, scale_bytes, owner, lane);
        to += scale_bytes;
#endif
        copy(to, piece.from, __shfl_sync(ALL, piece.bytes, owner), owner, lane);
        skip();
    }

    // A group without copies, so that they can be counted.
    static __device__ __forceinline__ void skip() {
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    static __device__ __forceinline__ void wait(u64*, u32) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        __syncwarp();
    }
};

#endif

// ---- The launch before ------------------------------------------------------------------------

// This launch may begin before the one before it in the stream has ended. That one is an `append` or
// an `attend` of the step, or the engine's: what it writes may be new tokens, queries, or a use of
// `partial`; whatever is older, the tables of the step among it, is there.

__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ---- Matrices -------------------------------------------------------------------------------

template <bool BRAIN>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint4& a, u32 b0, u32 b1) {
    if constexpr (BRAIN) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    }
}

__device__ __forceinline__ u32 transpose(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ float two_to(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What weights are relative to: infinitely small logits alone must give weights of 0, not NaN.
__device__ __forceinline__ float base_of(float maximum) { return maximum == NONE ? 0 : maximum; }

#if CODED

// x * y + z of bfloat16, two at once.
__device__ __forceinline__ u32 multiply_add(u32 x, u32 y, u32 z) {
    u32 sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
    return sum;
}

__device__ __forceinline__ u32 product(u32 x, u32 y) { return multiply_add(x, y, 0x80008000); }

// What operands of codes are multiplied with is 2^64 times too large, with fp8 2^51 times, and the sums
// 2^-69 times too small. Twice, as bfloat16; and from sums to what they stand for.
__device__ __forceinline__ constexpr u32 lift_of(u32 codes) {
    return codes == FP8 ? 0x59005900 : 0x5f805f80;
}
constexpr u32 LOWER = 0x1d001d00;
constexpr float RESTORE = 590295810358705651712.0f;

#endif

// ---- Walking over the work ------------------------------------------------------------------

// An item and what a worker has of it.
struct Stretch {
    Sequence sequence;
    Head head;
    Extent extent;
    u32 item;
    u32 sequence_index;
    u32 head_index;
    u32 tile;
    // Slices and units: from, to.
    u32 begin;
    u32 end;
    // Workers that share the item, and the number of this one among them.
    u32 sharers;
    u32 turn;

    __device__ __forceinline__ bool lean(u32 slice) const {
        return slice - extent.sink < extent.lean;
    }
};

// Thread blocks begin in the order of their numbers. First workers of items wait for those behind them,
// so these must begin earlier: where not all find room at once, none waits for one that cannot begin.
__device__ __forceinline__ u32 worker_of(const Attend& args) { return args.workers - 1 - blockIdx.x; }

struct Walk {
    Stretch at;

    // `next`: where the next worker starts.
    __device__ __forceinline__ void set_end(const Start& next) {
        at.end = at.item == next.item ? next.slice : at.extent.total;
    }

    // False where the worker has nothing to do.
    __device__ __forceinline__ bool start(const Attend& args) {
        u32 worker = worker_of(args);
        const Start& own = args.starts[worker];
        const Start& next = args.starts[worker + 1];
        at.item = own.item;
        at.begin = own.slice;
        at.sequence_index = own.sequence;
        at.head_index = own.head;
        at.tile = own.tile;
        at.sequence = own.its_sequence;
        at.head = own.its_head;
        at.extent = own.its_extent;
        at.sharers = own.sharers;
        at.turn = own.turn;
        set_end(next);
        return at.item != next.item || at.begin != next.slice;
    }

    // The next item; false where there is none.
    __device__ __forceinline__ bool next(const Attend& args) {
        // Read again, because registers are few.
        const Start& end = args.starts[worker_of(args) + 1];
        if (at.item + 1 > end.item || (at.item + 1 == end.item && end.slice == 0)) return false;
        at.item += 1;
        at.begin = 0;
        at.tile += 1;
        if (at.tile * ROWS >= at.sequence.tokens * args.group) {
            at.tile = 0;
            at.head_index += 1;
            if (at.head_index == args.kv_heads) {
                at.head_index = 0;
                at.sequence_index += 1;
                at.sequence = args.sequences[at.sequence_index];
            }
        }
        at.head = args.heads[at.head_index];
        at.extent = extent(
            at.sequence, at.head, at.tile, ROWS, args.group, args.blocks.block, args.blocks.slices
        );
        at.turn = 0;
        at.sharers = at.item == end.item ? end.sharers : 1;
        set_end(end);
        return true;
    }
};

// What a warp reads, in the order in which it will use it: addresses of 32 slices at a time, one
// per lane.
struct Feed {
    Walk walk;
    // The warp's next slice.
    u32 slice;
    // The next slice's lane.
    u32 turn;
    // Slices that were asked for.
    u32 count;
    bool more;
    Piece piece;

    __device__ __forceinline__ void
    start(const Attend& args, const Walk& from_here, bool any, u32 warp, u32 lane) {
        walk = from_here;
        count = 0;
        more = any;
        if (more) {
            slice = walk.at.begin + warp;
            look(args, warp, lane);
        }
    }

    // Addresses from `slice` on.
    __device__ __forceinline__ void look(const Attend& args, u32 warp, u32 lane) {
        while (slice >= walk.at.end) {
            more = walk.next(args);
            if (!more) return;
            slice = walk.at.begin + warp;
        }
        turn = 0;
        u32 own = slice + lane * WARPS;
        if (own < walk.at.end) {
            u32 physical = walk.at.extent.slice(own, walk.at.head);
            u32 index = physical / args.blocks.slices;
            u32 within = physical - index * args.blocks.slices;
            u64 block = address(args.blocks, args.tables[walk.at.sequence.table + index]);
            if (walk.at.lean(own)) {
                u32 bytes = lean_slice_bytes(walk.at.head);
                u64 from = block + walk.at.head.offset;
#if CODED
                piece.scales = from;
                piece.scale_bytes = scale_bytes(walk.at.head);
                from += piece.scale_bytes;
#endif
                piece.from = from + u64(within) * bytes;
                piece.bytes = unit_of(walk.at.head) * bytes;
            } else {
#if CODED
                piece.scale_bytes = 0;
#endif
                piece.bytes = FULL_SLICE;
                piece.from = block + u64(walk.at.head_index) * args.blocks.full_head +
                             within * FULL_SLICE;
            }
        }
    }

    // Whether the next slice may hold tokens of this step.
    __device__ __forceinline__ bool is_new(const Attend& args) const {
        u32 physical = walk.at.extent.slice(slice, walk.at.head);
        u32 index = physical / args.blocks.slices;
        u32 within = (physical - index * args.blocks.slices + 1) * TILE;
        return index * args.blocks.block + within > walk.at.sequence.start;
    }

    __device__ __forceinline__ void ask(const Attend& args, Shared& shared, u32 warp, u32 lane) {
        if (!more) {
            Ring::skip();
            return;
        }
        u32 stage = count % STAGES;
        Ring::fill(
            shared.ring[warp][stage], piece, &shared.filled[warp][stage], turn, lane
        );
        count += 1;
        turn += 1;
        slice += WARPS;
        if (turn == 32 || slice >= walk.at.end) look(args, warp, lane);
    }
};

// ---- One warp's share of an item --------------------------------------------------------------

struct Sums {
    // Per tile of 8 query rows and of 16 channels. Lane l has channels l / 4 (and 8 more) of query
    // rows l % 4 * 2 and one more; of the rows' maxima and weights the same rows.
    float out[NT][NV][4];
    float maximum[NT][2];
    float weight[NT][2];
#if CODED
    // What belongs to every channel of a group: as `out` of two groups for one tile, where channels are
    // lower and upper bytes of zeros in turn.
    float common[NT][(GROUPS + 1) / 2][4];
#endif

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
#if CODED
#pragma unroll
            for (u32 g = 0; g < (GROUPS + 1) / 2; g++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) common[n][g][i] = 0;
            }
#endif
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                maximum[n][i] = NONE;
                weight[n][i] = 0;
            }
#pragma unroll
            for (u32 m = 0; m < NV; m++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) out[n][m][i] = 0;
            }
        }
    }
};

// Reads which channels an item keeps to shared memory.
__device__ __forceinline__ void read_kept(const Attend& args, Shared& shared, const Stretch& at) {
    for (u32 i = threadIdx.x; i < WIDTH / 2; i += WARPS * 32) {
        ((u32*)shared.kept)[i] = ((const u32*)(args.channels + at.head.channels))[i];
    }
}

// Reads the queries of an item to shared memory.
template <u32 DTYPE>
__device__ __forceinline__ void read_queries(const Attend& args, Shared& shared, const Stretch& at) {
    u32 rows = at.sequence.tokens * args.group;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < ROWS * WIDTH; i += WARPS * 32) {
        u32 row = at.tile * ROWS + i / WIDTH, channel = i % WIDTH;
        bool is_there = row < rows && channel < args.head_dim;
        // What is not there is read from elsewhere, so that nothing but the data decides which loads
        // there are: they all begin at once.
        u32 token = is_there ? row / args.group : 0;
        u32 head = is_there ? at.head_index * args.group + row - token * args.group : 0;
        u64 index = u64(at.sequence.row + token) * args.q.token_stride +
                    u64(head) * args.q.head_stride + (is_there ? channel : 0);
        u16 x = load_stored<DTYPE>(args.q, index);
        shared.q[i / WIDTH][channel] = is_there ? x : u16(0);
    }
}

__device__ __forceinline__ void read_queries(const Attend& args, Shared& shared, const Stretch& at) {
    if (args.q.dtype == F32) {
        read_queries<F32>(args, shared, at);
    } else if (args.q.dtype == F16) {
        read_queries<F16>(args, shared, at);
    } else {
        read_queries<B16>(args, shared, at);
    }
}

// Query rows as B operands: lane l has of each tile of 16 channels those of number l % 4 * 2, one
// more, and 8 more than these, of query row l / 4.
struct Queries {
    u32 q[NT][NV][2];

    // All channels, or the kept ones and zeros.
    __device__ __forceinline__ void load(const Shared& shared, const Head& head, bool lean, u32 lane) {
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
            const u16* row = shared.q[n * 8 + lane / 4];
#pragma unroll
            for (u32 k = 0; k < NV; k++) {
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    u32 c = k * TILE + lane % 4 * 2 + i * 8;
                    if (lean) {
                        // Behind the kept channels the list goes on with 0, so that there is always
                        // something to read.
                        u32 pair = *(const u32*)&shared.kept[c];
                        u32 low = row[pair & 0xffff], high = row[pair >> 16];
                        low = c < head.kept ? low : 0;
                        high = c + 1 < head.kept ? high : 0;
                        q[n][k][i] = low | high << 16;
#if CODED
                        if (BF16 && head.k_codes != PLAIN) {
                            q[n][k][i] = product(q[n][k][i], lift_of(head.k_codes));
                        }
#endif
                    } else {
                        q[n][k][i] = *(const u32*)&row[c];
                    }
                }
            }
        }
    }
};

// Tokens of a slice that not every query row sees.
struct Edge {
    // The first token's position, and how many tokens the slice has in its block.
    u32 position;
    u32 tokens;
    // First query token of the tile, its position, and how many the tile has.
    u32 first;
    u32 first_position;
    u32 count;

    // Tokens of the slice that query token `first + i` sees.
    __device__ __forceinline__ u32 seen(u32 i) const {
        u32 until = first_position + i + 1;
        return until <= position ? 0 : min(tokens, until - position);
    }
};

// The elements of tokens from `seen` on become 0: they may be anything, and 0 times infinity is
// not 0.
__device__ __forceinline__ uint4 hide(uint4 v, u32 seen, u32 lane) {
    u32 token = lane % 4 * 2;
    u32 low = token < seen ? (token + 1 < seen ? ALL : 0xffff) : 0;
    u32 high = token + 8 < seen ? (token + 9 < seen ? ALL : 0xffff) : 0;
    return make_uint4(v.x & low, v.y & low, v.z & high, v.w & high);
}

// Makes weights of the logits of slices, relative to the maxima of their query rows, and adds them up.
// Weights of tokens l / 4 and 8 more, of query rows l % 4 * 2 and one more, become B operands of two
// tiles of 8 x 8: bfloat16 where `BRAIN`, or f16.
template <u32 U, bool BRAIN>
__device__ __forceinline__ void
weigh(const float (&x)[U][NT][4], Sums& sums, u32 (&weights)[U][NT][2], u32 lane) {
#pragma unroll
    for (u32 n = 0; n < NT; n++) {
        float most[2] = {fmaxf(x[0][n][0], x[0][n][2]), fmaxf(x[0][n][1], x[0][n][3])};
#pragma unroll
        for (u32 j = 1; j < U; j++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                most[i] = fmaxf(most[i], fmaxf(x[j][n][i], x[j][n][i + 2]));
            }
        }
#pragma unroll
        for (u32 step = 4; step < 32; step *= 2) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                most[i] = fmaxf(most[i], __shfl_xor_sync(ALL, most[i], step));
            }
        }
        bool moves = most[0] > sums.maximum[n][0] + SLACK || most[1] > sums.maximum[n][1] + SLACK;
        if (__any_sync(ALL, moves)) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float maximum = fmaxf(sums.maximum[n][i], most[i]);
                float factor = two_to(sums.maximum[n][i] - base_of(maximum));
                sums.maximum[n][i] = maximum;
                sums.weight[n][i] *= factor;
#pragma unroll
                for (u32 m = 0; m < NV; m++) {
                    sums.out[n][m][i] *= factor;
                    sums.out[n][m][i + 2] *= factor;
                }
#if CODED
#pragma unroll
                for (u32 g = 0; g < (GROUPS + 1) / 2; g++) {
                    sums.common[n][g][i] *= factor;
                    sums.common[n][g][i + 2] *= factor;
                }
#endif
            }
        }
#pragma unroll
        for (u32 j = 0; j < U; j++) {
            float p[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) p[i] = two_to(x[j][n][i] - base_of(sums.maximum[n][i % 2]));
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 pair = pack<BRAIN>(p[2 * i], p[2 * i + 1]);
                // What is divided by at the end are the weights as they were used.
                sums.weight[n][0] += low_of<BRAIN>(pair);
                sums.weight[n][1] += high_of<BRAIN>(pair);
                weights[j][n][i] = transpose(pair);
            }
        }
    }
}

// Adds V's tile times weights; `lower` where sums are of products with codes.
__device__ __forceinline__ void
add_tile(float (&sum)[4], const uint4& a, u32 b0, u32 b1, [[maybe_unused]] bool lower) {
#if CODED
    if constexpr (BF16) {
        b0 = lower ? product(b0, LOWER) : b0;
        b1 = lower ? product(b1, LOWER) : b1;
        multiply<true>(sum, a, b0, b1);
    } else {
        float own[4] = {};
        multiply<false>(own, a, b0, b1);
#pragma unroll
        for (u32 i = 0; i < 4; i++) sum[i] = fmaf(own[i], lower ? 1 / RESTORE : 1, sum[i]);
    }
#else
    multiply<BF16>(sum, a, b0, b1);
#endif
}

// Plain elements of a slice.
template <bool EDGE>
__device__ __forceinline__ void take(
    const Attend& args, const u8* ring, u32 k_tiles, const Head& head, const Queries& queries,
    Sums& sums, const Edge& edge, u32 row, u32 lane
) {
    bool lower = CODED && head.v_codes != PLAIN;
    const uint4* k = (const uint4*)ring + lane;
    float even[NT][4] = {};
    float odd[NT][4] = {};
#pragma unroll
    for (u32 t = 0; t < NV; t++) {
        if (t < k_tiles) {
            uint4 a = k[t * 32];
#pragma unroll
            for (u32 n = 0; n < NT; n++) {
                multiply<BF16>(t % 2 ? odd[n] : even[n], a, queries.q[n][t][0], queries.q[n][t][1]);
            }
        }
    }

    // Logits of tokens l / 4 and 8 more, of query rows l % 4 * 2 and one more.
    float x[1][NT][4];
#pragma unroll
    for (u32 n = 0; n < NT; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float logit = (even[n][i] + odd[n][i]) * args.scale;
            if constexpr (CAP) logit = args.cap * tanhf(logit * args.inverse_cap);
            if (EDGE) {
                u32 token = (row + n * 8 + lane % 4 * 2 + i % 2) / args.group - edge.first;
                bool sees = lane / 4 + i / 2 * 8 < edge.seen(token);
                logit = sees ? logit : NONE;
            }
            x[0][n][i] = logit;
        }
    }
    u32 weights[1][NT][2];
    weigh<1, BF16>(x, sums, weights, lane);

    const uint4* v = k + k_tiles * 32;
    if constexpr (!EDGE) {
#pragma unroll
        for (u32 m = 0; m < NV; m++) {
            uint4 a = v[m * 32];
#pragma unroll
            for (u32 n = 0; n < NT; n++) {
                add_tile(sums.out[n][m], a, weights[0][n][0], weights[0][n][1], lower);
            }
        }
    } else {
        // One query token after the other, each with the tokens that it sees.
        for (u32 i = 0; i < edge.count; i++) {
            u32 seen = edge.seen(i);
            if (seen == 0) continue;
#pragma unroll
            for (u32 n = 0; n < NT; n++) {
                bool own = (row + n * 8 + lane / 4) / args.group - edge.first == i;
                u32 b0 = own ? weights[0][n][0] : 0;
                u32 b1 = own ? weights[0][n][1] : 0;
#pragma unroll
                for (u32 m = 0; m < NV; m++) {
                    add_tile(sums.out[n][m], hide(v[m * 32], seen, lane), b0, b1, lower);
                }
            }
        }
    }
}

#if CODED

// ---- Codes ------------------------------------------------------------------------------------

// 1/16, twice, as bfloat16.
constexpr u32 SIXTEENTH = 0x3d803d80;

// Two e4m3 as bfloat16, 2^-120 times as large: exponent and mantissa are 4 bits further up, the sign 8.
__device__ __forceinline__ u32 floats(u32 bytes) {
    // A sign carries over the ones to the highest bit; without one they are masked.
    return bytes * 16 + 0x78007800 & 0x87f087f0;
}

// The operand of the codes of a lane. Of those of 4 bits, the columns from 8 on are 16 times too large.
template <u32 CODES>
__device__ __forceinline__ uint4 operand(const u8* codes) {
    if constexpr (CODES == INT4) {
        constexpr u32 LOW = 0x000f000f, HIGH = 0x00f000f0;
        u32 x = *(const u32*)codes;
        return make_uint4(x & LOW, x >> 8 & LOW, x & HIGH, x >> 8 & HIGH);
    } else {
        constexpr u32 LOW = 0x4240, HIGH = 0x4341;
        uint2 x = *(const uint2*)codes;
        uint4 bytes = make_uint4(
            __byte_perm(x.x, 0, LOW), __byte_perm(x.x, 0, HIGH), __byte_perm(x.y, 0, LOW),
            __byte_perm(x.y, 0, HIGH)
        );
        if constexpr (CODES == INT8) return bytes;
        return make_uint4(
            floats(bytes.x), floats(bytes.y), floats(bytes.z), floats(bytes.w)
        );
    }
}

// Lower and upper bytes of two zeros as operands, with their signs.
__device__ __forceinline__ u32 low_bytes(u32 zeros) { return zeros & 0x80ff80ff; }

__device__ __forceinline__ u32 high_bytes(u32 zeros) {
    return __byte_perm(zeros, 0, 0xb391) & 0x807f807f;
}

// Two queries times steps, rounded, and what rounding took from them.
template <u32 CODES>
__device__ __forceinline__ void scale_queries(u32 q, u32 steps, u32& scaled, u32& rest) {
    if constexpr (BF16) {
        scaled = product(q, steps);
        rest = multiply_add(q, steps, scaled ^ 0x80008000);
    } else {
        float lift = low_of<true>(lift_of(CODES));
        float low = low_of<false>(q) * lift * low_of<true>(steps);
        float high = high_of<false>(q) * lift * high_of<true>(steps);
        scaled = pack<true>(low, high);
        rest = pack<true>(low - low_of<true>(scaled), high - high_of<true>(scaled));
    }
}

// Products of U slices, and what all of their tokens have in common: of query rows l % 4 * 2 and one more.
template <u32 CODES, u32 U>
__device__ __forceinline__ void multiply_k(
    const u8* scales, const u8* slices, const Head& head, const Queries& queries,
    float (&x)[U][NT][4], float (&common)[NT][2], u32 lane
) {
    constexpr u32 WORDS = words_of(CODES);
    const u8* codes = slices + lane * (4 * WORDS);
    u32 slice = lean_slice_bytes(head);
    // Codes of 8 bits are worth what rounding took.
    constexpr bool TWICE = CODES == INT8;
    // Products with lower bytes, with upper bytes.
    float zeros[NT][4] = {};
#pragma unroll
    for (u32 t = 0; t < NV; t++) {
        if (t >= head.tiles) break;
        uint4 scale = *((const uint4*)(scales + t * SCALE_BYTES) + lane % 4);
        uint4 zero = make_uint4(
            low_bytes(scale.z), high_bytes(scale.z), low_bytes(scale.w), high_bytes(scale.w)
        );
        u32 b[NT][2], rest[NT][2];
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
            scale_queries<CODES>(queries.q[n][t][0], scale.x, b[n][0], rest[n][0]);
            scale_queries<CODES>(queries.q[n][t][1], scale.y, b[n][1], rest[n][1]);
            if constexpr (CODES != FP8) multiply<true>(zeros[n], zero, b[n][0], b[n][1]);
            if constexpr (TWICE) multiply<true>(zeros[n], zero, rest[n][0], rest[n][1]);
            if constexpr (CODES == INT4) b[n][1] = product(b[n][1], SIXTEENTH);
        }
#pragma unroll
        for (u32 j = 0; j < U; j++) {
            uint4 a = operand<CODES>(codes + t * (WORDS * CODE_BYTES) + j * slice);
#pragma unroll
            for (u32 n = 0; n < NT; n++) {
                multiply<true>(x[j][n], a, b[n][0], b[n][1]);
                if constexpr (TWICE) multiply<true>(x[j][n], a, rest[n][0], rest[n][1]);
            }
        }
    }
#pragma unroll
    for (u32 n = 0; n < NT; n++) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) common[n][i] = fmaf(zeros[n][i + 2], 256, zeros[n][i]);
    }
}

// Adds V of U slices; `v` is where that of the first begins.
template <u32 CODES, u32 U>
__device__ __forceinline__ void add_v(
    const u8* v, u32 slice, u32 (&weights)[U][NT][2], Sums& sums, u32 lane
) {
    constexpr u32 WORDS = words_of(CODES);
    // Every second row of the operand of zeros has lower bytes, the others upper ones.
    bool is_low = lane / 4 % 2 == 0;
    u32 bytes = is_low ? 0x3210 : 0xb391, mask = is_low ? 0x80ff80ff : 0x807f807f;
    // Not unrolled: the loop over units must fit where instructions are at hand.
#pragma unroll 1
    for (u32 j = 0; j < U; j++) {
        const u8* codes = v + j * slice + lane * (4 * WORDS);
        const uint4* scales = (const uint4*)(v + j * slice + NV * WORDS * CODE_BYTES) + lane % 4;
        u32 weight[NT][2];
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                weight[n][i] = product(weights[0][n][i], lift_of(CODES));
#pragma unroll
                for (u32 k = 1; k < U; k++) weights[k - 1][n][i] = weights[k][n][i];
            }
        }
        constexpr u32 groups = CODES == INT4 ? GROUPS : 1;
#pragma unroll
        for (u32 g = 0; g < groups; g++) {
            uint4 scale = scales[g * 4];
            u32 low = __byte_perm(scale.z, 0, bytes) & mask;
            u32 high = __byte_perm(scale.w, 0, bytes) & mask;
            uint4 zero = g % 2 ? make_uint4(0, low, 0, high) : make_uint4(low, 0, high, 0);
            u32 b[NT][2];
#pragma unroll
            for (u32 n = 0; n < NT; n++) {
                b[n][0] = product(weight[n][0], scale.x);
                b[n][1] = product(weight[n][1], scale.y);
                if constexpr (CODES != FP8) {
                    multiply<true>(sums.common[n][g / 2], zero, b[n][0], b[n][1]);
                }
                if constexpr (CODES == INT4) b[n][1] = product(b[n][1], SIXTEENTH);
            }
            constexpr u32 tiles = CODES == INT4 ? GROUP_TILES : NV;
#pragma unroll
            for (u32 m = g * tiles; m < min(NV, (g + 1) * tiles); m++) {
                uint4 a = operand<CODES>(codes + m * (WORDS * CODE_BYTES));
#pragma unroll
                for (u32 n = 0; n < NT; n++) multiply<true>(sums.out[n][m], a, b[n][0], b[n][1]);
            }
        }
    }
}

// Slices of a head that has codes; `tokens`: from their first one to the end of the block. All queries
// see them.
template <u32 U>
__device__ __forceinline__ void take_slices(
    const Attend& args, const u8* scales, const u8* slices, const Head& head,
    const Queries& queries, Sums& sums, u32 tokens, u32 lane
) {
    u32 slice = lean_slice_bytes(head);
    float x[U][NT][4] = {};
    float common[NT][2] = {};
    float scale = RESTORE * args.scale;
    if (head.k_codes == INT4) {
        multiply_k<INT4>(scales, slices, head, queries, x, common, lane);
    } else if (head.k_codes == INT8) {
        multiply_k<INT8>(scales, slices, head, queries, x, common, lane);
    } else if (head.k_codes == FP8) {
        multiply_k<FP8>(scales, slices, head, queries, x, common, lane);
    } else {
        scale = args.scale;
#pragma unroll
        for (u32 t = 0; t < NV; t++) {
            if (t >= head.tiles) break;
#pragma unroll
            for (u32 j = 0; j < U; j++) {
                uint4 a = *((const uint4*)(slices + j * slice + t * TILE_BYTES) + lane);
#pragma unroll
                for (u32 n = 0; n < NT; n++) {
                    multiply<BF16>(x[j][n], a, queries.q[n][t][0], queries.q[n][t][1]);
                }
            }
        }
    }
#pragma unroll
    for (u32 n = 0; n < NT; n++) {
#pragma unroll
        for (u32 j = 0; j < U; j++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                float logit = (x[j][n][i] + common[n][i % 2]) * scale;
                if constexpr (CAP) logit = args.cap * tanhf(logit * args.inverse_cap);
                x[j][n][i] = logit;
            }
        }
    }
    if (tokens < U * TILE) {
#pragma unroll
        for (u32 j = 0; j < U; j++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                bool is_there = j * TILE + i / 2 * 8 + lane / 4 < tokens;
#pragma unroll
                for (u32 n = 0; n < NT; n++) x[j][n][i] = is_there ? x[j][n][i] : NONE;
            }
        }
    }

    const u8* v = slices + lean_k_bytes(head);
    u32 weights[U][NT][2];
    if (head.v_codes != PLAIN) {
        weigh<U, true>(x, sums, weights, lane);
        if (head.v_codes == INT4) {
            add_v<INT4>(v, slice, weights, sums, lane);
        } else if (head.v_codes == INT8) {
            add_v<INT8>(v, slice, weights, sums, lane);
        } else {
            add_v<FP8>(v, slice, weights, sums, lane);
        }
    } else {
        weigh<U, BF16>(x, sums, weights, lane);
#pragma unroll
        for (u32 j = 0; j < U; j++) {
#pragma unroll
            for (u32 m = 0; m < NV; m++) {
                uint4 a = *((const uint4*)(v + j * slice + m * TILE_BYTES) + lane);
#pragma unroll
                for (u32 n = 0; n < NT; n++) {
                    multiply<BF16>(sums.out[n][m], a, weights[j][n][0], weights[j][n][1]);
                }
            }
        }
    }
}

// Makes sums of products with codes what they stand for.
__device__ __forceinline__ void settle(const Head& head, Sums& sums, u32 lane) {
    if (head.v_codes == PLAIN) return;
    bool is_low = lane / 4 % 2 == 0;
#pragma unroll
    for (u32 n = 0; n < NT; n++) {
#pragma unroll
        for (u32 g = 0; g < GROUPS; g++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float common = sums.common[n][g / 2][g % 2 * 2 + i] * (is_low ? 1 : 256);
                common += __shfl_xor_sync(ALL, common, 4);
#pragma unroll
                for (u32 m = 0; m < NV; m++) {
                    // Of 8 bits there is one group.
                    bool within = head.v_codes != INT4 ? g == 0 : m / GROUP_TILES == g;
                    if (within) {
                        sums.out[n][m][i] = (sums.out[n][m][i] + common) * RESTORE;
                        sums.out[n][m][i + 2] = (sums.out[n][m][i + 2] + common) * RESTORE;
                    }
                }
            }
        }
    }
}

#endif

// ---- The end of an item -----------------------------------------------------------------------

__device__ __forceinline__ void write(
    const Attend& args, const Stretch& at, u32 tile_row, u32 channel, float4 sum, float weight
) {
    u32 row = at.tile * ROWS + tile_row;
    u32 token = row / args.group;
    u32 head = at.head_index * args.group + row - token * args.group;
    u64 index = u64(at.sequence.row + token) * args.out.token_stride +
                u64(head) * args.out.head_stride + channel;
    float x[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (channel + i < args.head_dim) store(args.out, index + i, x[i] / weight);
    }
}

// Query rows of a tile.
__device__ __forceinline__ u32 rows_of(const Attend& args, const Stretch& at) {
    return min(ROWS, at.sequence.tokens * args.group - at.tile * ROWS);
}

// What is no result: a NaN that no arithmetic gives.
#define ABSENT 0xffffffffu

__device__ __forceinline__ float present(float x) {
    return __float_as_uint(x) == ABSENT ? __uint_as_float(0x7fffffff) : x;
}

// Of the workers that share an item, each one whose number is a multiple of this merges what the
// workers up to the next such leave; the first, then, what these leave. Workers wait for those behind
// them alone.
constexpr u32 FAN = 8;

// From a worker's partial results to the next one's, in units of four sums.
constexpr u64 STRIDE = ROWS * (WIDTH / 4);

// Four sums of a query row, relative to `maximum`.
struct Part {
    float4 sum;
    float maximum;
    float weight;

    __device__ __forceinline__ void add(const Part& other) {
        float most = fmaxf(maximum, other.maximum);
        float own = two_to(maximum - base_of(most));
        float factor = two_to(other.maximum - base_of(most));
        maximum = most;
        weight = weight * own + other.weight * factor;
        sum.x = sum.x * own + other.sum.x * factor;
        sum.y = sum.y * own + other.sum.y * factor;
        sum.z = sum.z * own + other.sum.z * factor;
        sum.w = sum.w * own + other.sum.w * factor;
    }

    __device__ __forceinline__ void put(const Attend& args, u64 place) const {
        args.partial_weight[place] = make_float2(maximum, weight);
        args.partial[place] = sum;
    }

    // Leaves it to a worker before this one.
    __device__ __forceinline__ void leave(const Attend& args, u64 place) const {
        float4 there = {present(sum.x), present(sum.y), present(sum.z), present(sum.w)};
        Part{there, present(maximum), present(weight)}.put(args, place);
    }

    static __device__ __forceinline__ Part absent() {
        float word = __uint_as_float(ABSENT);
        return Part{make_float4(word, word, word, word), word, word};
    }

    // What another worker may have left by now, if `wanted`. Volatile: it is asked for until it is
    // there. A predicate and no branch, so that many are asked for at once.
    __device__ __forceinline__ void look(const float4* sums, const float2* weights, bool wanted) {
        asm volatile("{\n"
                     ".reg .pred wanted;\n"
                     "setp.ne.u32 wanted, %8, 0;\n"
                     "@wanted ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%6];\n"
                     "@wanted ld.volatile.global.v2.f32 {%4, %5}, [%7];\n"
                     "}\n"
                     : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w), "+f"(maximum), "+f"(weight)
                     : "l"(sums), "l"(weights), "r"(u32(wanted))
                     : "memory");
    }

    // Adds what `count` workers leave, every `step`-th behind the one at `place`, and takes it away.
    __device__ __forceinline__ void collect(const Attend& args, u64 place, u32 count, u32 step) {
        for (u32 begin = 0; begin < count; begin += FAN) {
            u64 first = place + (begin + 1) * step * STRIDE;
            Part parts[FAN];
            bool wanted[FAN];
#pragma unroll
            for (u32 j = 0; j < FAN; j++) {
                parts[j] = absent();
                wanted[j] = begin + j < count;
            }
            // All that are not there yet are asked for together: one by one, each would take its own
            // way to memory and back after the last had come.
            bool waits = true;
            while (waits) {
                waits = false;
#pragma unroll
                for (u32 j = 0; j < FAN; j++) {
                    u64 at = first + j * step * STRIDE;
                    parts[j].look(args.partial + at, args.partial_weight + at, wanted[j]);
                }
#pragma unroll
                for (u32 j = 0; j < FAN; j++) {
                    wanted[j] = begin + j < count && !parts[j].is_there();
                    waits |= wanted[j];
                }
            }
#pragma unroll
            for (u32 j = 0; j < FAN; j++) {
                if (begin + j < count) {
                    absent().put(args, first + j * step * STRIDE);
                    add(parts[j]);
                }
            }
        }
    }

    // Words come one by one, so each says for itself whether it is there, and no fence is needed.
    __device__ __forceinline__ bool is_there() const {
        return __float_as_uint(sum.x) != ABSENT && __float_as_uint(sum.y) != ABSENT &&
               __float_as_uint(sum.z) != ABSENT && __float_as_uint(sum.w) != ABSENT &&
               __float_as_uint(maximum) != ABSENT && __float_as_uint(weight) != ABSENT;
    }
};

// Joins what the warps have, and what other workers have of the item.
__device__ __forceinline__ void
finish(const Attend& args, Shared& shared, const Walk& walk, Sums& sums, u32 warp, u32 lane) {
    const Stretch& at = walk.at;
    u32 rows = rows_of(args, at);
#if CODED
    settle(at.head, sums, lane);
#endif
    // Results to merge: of the workers behind this one, of those that have merged others'.
    u32 near = at.turn % FAN == 0 ? min(FAN, at.sharers - at.turn) - 1 : 0;
    u32 far = at.turn == 0 ? (at.sharers - 1) / FAN : 0;
#pragma unroll
    for (u32 n = 0; n < NT; n++) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
#pragma unroll
            for (u32 step = 4; step < 32; step *= 2) {
                sums.weight[n][i] += __shfl_xor_sync(ALL, sums.weight[n][i], step);
            }
        }
        // Four channels of a row each.
        constexpr u32 PARTS = (8 * (WIDTH / 4) + WARPS * 32 - 1) / (WARPS * 32);
        Part all[PARTS];
#pragma unroll
        for (u32 k = 0; k < PARTS; k++) all[k] = {make_float4(0, 0, 0, 0), NONE, 0};
#pragma unroll
        for (u32 first = 0; first < WARPS; first += SUM_WARPS) {
            __syncthreads();
            if (warp - first < SUM_WARPS) {
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    u32 row = lane % 4 * 2 + i;
                    if (lane < 4) {
                        shared.weights[warp][row] =
                            make_float2(sums.maximum[n][i], sums.weight[n][i]);
                    }
#pragma unroll
                    for (u32 m = 0; m < NV; m++) {
                        float* to = &shared.sums[warp - first][row][m * TILE + lane / 4];
                        to[0] = sums.out[n][m][i];
                        to[8] = sums.out[n][m][i + 2];
                    }
                }
            }
            __syncthreads();
#pragma unroll
            for (u32 k = 0; k < PARTS; k++) {
                u32 i = threadIdx.x + k * WARPS * 32;
                u32 row = i / (WIDTH / 4), four = i % (WIDTH / 4);
                if (row < 8 && n * 8 + row < rows) {
#pragma unroll
                    for (u32 w = 0; w < SUM_WARPS; w++) {
                        float2 weights = shared.weights[first + w][row];
                        float4 sum = *(const float4*)&shared.sums[w][row][four * 4];
                        all[k].add(Part{sum, weights.x, weights.y});
                    }
                }
            }
        }
#pragma unroll
        for (u32 k = 0; k < PARTS; k++) {
            u32 i = threadIdx.x + k * WARPS * 32;
            u32 row = i / (WIDTH / 4), four = i % (WIDTH / 4);
            if (row < 8 && n * 8 + row < rows) {
                u64 place = worker_of(args) * STRIDE + (n * 8 + row) * (WIDTH / 4) + four;
                all[k].collect(args, place, near, 1);
                all[k].collect(args, place, far, FAN);
                if (at.turn > 0) {
                    all[k].leave(args, place);
                } else {
                    write(args, at, n * 8 + row, four * 4, all[k].sum, all[k].weight);
                }
            }
        }
        // Lanes may have waited for others' results for different times; barriers are for whole warps.
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attend(const __grid_constant__ Attend args) {
    extern __shared__ __align__(128) u8 memory[];
    Shared& shared = *(Shared*)memory;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
        for (u32 stage = 0; stage < STAGES; stage++) Ring::init(&shared.filled[warp][stage]);
        Ring::publish();
    }
    __syncwarp();

    Walk walk;
    bool more = walk.start(args);
    Feed feed;
    feed.start(args, walk, more, warp, lane);
    bool waited = false;
    for (u32 stage = 0; stage < STAGES; stage++) {
        if (!waited && feed.more && feed.is_new(args)) {
            wait_for_launch_before();
            waited = true;
        }
        feed.ask(args, shared, warp, lane);
    }
    if (more) read_kept(args, shared, walk.at);
    if (!waited) wait_for_launch_before();
    let_next_launch_begin();

    Sums sums;
    Queries queries;
    u32 used = 0;
    while (more) {
        const Stretch& at = walk.at;
        read_queries(args, shared, at);
        __syncthreads();
        sums.clear();
        u32 row = at.tile * ROWS;
        Edge edge;
        edge.first = row / args.group;
        edge.first_position = at.sequence.start + edge.first;
        edge.count = (row + rows_of(args, at) - 1) / args.group - edge.first + 1;
        // Slices before this one have 16 tokens that all queries see. Where blocks end within a slice,
        // none is taken for one.
        u32 plain = 0;
        if (args.blocks.block % TILE == 0) plain = (edge.first_position + 1) / TILE - at.extent.skipped;
        // Which channels the queries have: 2: none yet.
        u32 loaded = 2;
        for (u32 s = at.begin + warp; s < at.end; s += WARPS) {
            bool lean = at.lean(s);
            if (loaded != lean) {
                queries.load(shared, at.head, lean, lane);
                loaded = lean;
            }
            u32 stage = used % STAGES;
            Ring::wait(&shared.filled[warp][stage], used / STAGES);
            const u8* ring = shared.ring[warp][stage];
            u32 k_tiles = lean ? at.head.tiles : NV;
#if CODED
            if (lean && is_coded(at.head)) {
                u32 unit = at.head.unit;
                u32 within = (s - at.extent.sink) * unit % args.blocks.slices;
                u32 tokens = args.blocks.block - within * TILE;
                const u8* slices = ring + scale_bytes(at.head);
                // More would take too many registers, and seconds to compile.
                constexpr u32 AT_ONCE = NT * NV > 8 ? 1 : 2;
                if (unit > 1) {
                    for (u32 j = 0; j < unit; j += AT_ONCE) {
                        const u8* own = slices + j * lean_slice_bytes(at.head);
                        u32 left = tokens - j * TILE;
                        take_slices<AT_ONCE>(args, ring, own, at.head, queries, sums, left, lane);
                    }
                } else {
                    take_slices<1>(args, ring, slices, at.head, queries, sums, tokens, lane);
                }
            } else
#endif
            if (s < plain) {
                take<false>(args, ring, k_tiles, at.head, queries, sums, edge, row, lane);
            } else {
                u32 physical = at.extent.slice(s, at.head);
                u32 index = physical / args.blocks.slices;
                u32 within = (physical - index * args.blocks.slices) * TILE;
                edge.position = index * args.blocks.block + within;
                edge.tokens = min(TILE, args.blocks.block - within);
                take<true>(args, ring, k_tiles, at.head, queries, sums, edge, row, lane);
            }
            __syncwarp();
            used += 1;
            feed.ask(args, shared, warp, lane);
        }
        finish(args, shared, walk, sums, warp, lane);
        more = walk.next(args);
        // All threads must be done with the sums before something else lies there.
        __syncthreads();
        if (more) read_kept(args, shared, at);
    }
}
