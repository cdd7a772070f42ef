// Cuts the attention of a step into stretches of equally many bytes, for every layer at once: one
// thread block per layer.

// What an item costs beside its bytes (its queries, its sums and its result): a microsecond, as bytes
// that a multiprocessor reads meanwhile.
constexpr u64 ITEM_BYTES = 24576;
// Fewest bytes worth a worker of their own: so many that no two workers start at the same slice.
constexpr u64 LEAST_BYTES = 2 * (ITEM_BYTES + FULL_SLICE);
constexpr u32 THREADS = 1024;

struct Cut {
    const Sequence* sequences;
    // [layers, KV heads]
    const Head* heads;
    // [layers, workers + 1]
    Start* starts;
    u32 sequence_count;
    u32 items;
    u32 workers;
    u32 kv_heads;
    // Query rows per tile, query heads per KV head.
    u32 rows;
    u32 group;
    u32 block;
    u32 slices;
};

static_assert(sizeof(Cut) == 56, "the host counts otherwise");

// An item's place, found once and then counted on.
struct Place {
    u32 item;
    u32 index;
    u32 head;
    u32 tile;
    Sequence sequence;

    __device__ void find(const Cut& args, u32 wanted) {
        item = wanted;
        index = find_sequence(args.sequences, args.sequence_count, wanted);
        sequence = args.sequences[index];
        u32 within = wanted - sequence.before;
        head = within / sequence.tiles;
        tile = within % sequence.tiles;
    }

    __device__ void next(const Cut& args) {
        item += 1;
        tile += 1;
        if (tile < sequence.tiles) return;
        tile = 0;
        head += 1;
        if (head < args.kv_heads) return;
        head = 0;
        index += 1;
        if (index < args.sequence_count) sequence = args.sequences[index];
    }
};

struct Cost {
    Extent extent;
    u64 lean_unit;

    __device__ Cost(const Cut& args, const Place& place, const Head* heads) {
        const Head& head = heads[place.head];
        extent = ::extent(
            place.sequence, head, place.tile, args.rows, args.group, args.block, args.slices
        );
        lean_unit = lean_unit_bytes(head);
    }

    __device__ u64 bytes() const {
        return ITEM_BYTES + u64(extent.total - extent.lean) * FULL_SLICE +
               extent.lean * lean_unit;
    }

    // The slice at so many bytes from the start of the item.
    __device__ u32 slice(u64 at) const {
        at = at > ITEM_BYTES ? at - ITEM_BYTES : 0;
        u64 sink = u64(extent.sink) * FULL_SLICE, lean = extent.lean * lean_unit;
        u64 slice;
        if (at < sink) {
            slice = at / FULL_SLICE;
        } else if (at < sink + lean) {
            slice = extent.sink + (at - sink) / lean_unit;
        } else {
            slice = extent.sink + extent.lean + (at - sink - lean) / FULL_SLICE;
        }
        return min(u32(slice), extent.total - 1);
    }
};

// Sum of `own` over the threads before this one, for every thread, and over all.
__device__ u64 sum_before(u64 own, u64* before) {
    __shared__ u64 sums[THREADS / 32];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 sum = own;
    for (u32 step = 1; step < 32; step *= 2) {
        u64 other = __shfl_up_sync(0xffffffff, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    u64 of_warp = sums[lane];
    for (u32 step = 1; step < 32; step *= 2) {
        u64 other = __shfl_up_sync(0xffffffff, of_warp, step);
        if (lane >= step) of_warp += other;
    }
    u64 all = __shfl_sync(0xffffffff, of_warp, 31);
    u64 before_warp = __shfl_sync(0xffffffff, of_warp, max(warp, 1) - 1);
    before[threadIdx.x] = (warp == 0 ? 0 : before_warp) + sum - own;
    __syncthreads();
    return all;
}

extern "C" __global__ void __launch_bounds__(THREADS) cut(const __grid_constant__ Cut args) {
    // Bytes before each thread's items.
    __shared__ u64 before[THREADS];
    const Head* heads = args.heads + blockIdx.x * args.kv_heads;
    Start* starts = args.starts + u64(blockIdx.x) * (args.workers + 1);
    u32 each = (args.items + THREADS - 1) / THREADS;
    u32 first = min(args.items, threadIdx.x * each);
    u32 last = min(args.items, first + each);

    Place place;
    u64 own = 0;
    if (first < last) {
        place.find(args, first);
        for (; place.item < last; place.next(args)) own += Cost(args, place, heads).bytes();
    }
    u64 all = sum_before(own, before);
    u64 workers = min(u64(args.workers), max(u64(1), all / LEAST_BYTES));

    for (u32 worker = threadIdx.x; worker < workers; worker += THREADS) {
        u64 start_at = worker * all / workers;
        // The thread whose items the worker starts in, the last one that begins by then.
        u32 low = 0, high = (args.items + each - 1) / each;
        while (high - low > 1) {
            u32 middle = (low + high) / 2;
            if (before[middle] <= start_at) {
                low = middle;
            } else {
                high = middle;
            }
        }
        u64 at = before[low];
        place.find(args, low * each);
        Cost cost(args, place, heads);
        while (at + cost.bytes() <= start_at) {
            at += cost.bytes();
            place.next(args);
            cost = Cost(args, place, heads);
        }
        // Workers that start in the item; the one before them may have its first slices.
        u64 end = at + cost.bytes();
        u32 from = (at * workers + all - 1) / all;
        u32 until = (end * workers + all - 1) / all;
        bool from_start = cost.slice(from * all / workers - at) == 0;
        Start start = {};
        start.item = place.item;
        start.slice = cost.slice(start_at - at);
        start.sequence = place.index;
        start.head = place.head;
        start.tile = place.tile;
        u32 before = from_start ? 0 : 1;
        start.sharers = until - from + before;
        start.turn = worker - from + before;
        start.its_sequence = place.sequence;
        start.its_head = heads[place.head];
        start.its_extent = cost.extent;
        starts[worker] = start;
    }
    // The end, which workers without work have for a start too. They read all of it.
    for (u32 w = u32(workers) + threadIdx.x; w <= args.workers; w += THREADS) {
        Start end = {};
        end.item = args.items;
        starts[w] = end;
    }
}
