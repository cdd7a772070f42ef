/* The C ABI from the side of C: what it answers, above all to calls that are wrong. Compiled as C and as
 * C++ and run by tools/capi.sh, which also checks that every function of the header is called here. */
#include <leank.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, QUERY_HEADS = 4, KV_HEADS = 2, HEAD_DIM = 64, BLOCK = 64, TOKENS = 2048 };
enum { KV_ROW = KV_HEADS * HEAD_DIM, Q_ROW = QUERY_HEADS * HEAD_DIM };

static int failures;

static void expect(int line, leank_status expected, leank_status found)
{
    if (found == expected && (found == LEANK_OK || leank_last_error()[0] != '\0')) return;
    failures++;
    fprintf(stderr, "line %d: %s instead of %s: %s\n", line, leank_status_name(found), leank_status_name(expected),
            leank_last_error());
}

static void is_true(int line, int truth, const char *what)
{
    if (truth) return;
    failures++;
    fprintf(stderr, "line %d: not so: %s\n", line, what);
}

#define EXPECT(status, call) expect(__LINE__, status, call)
#define OK(call) EXPECT(LEANK_OK, call)
#define TRUE(what) is_true(__LINE__, (what) != 0, #what)
/* The call fails so, and its message names this. */
#define SAYS(status, call, text) (EXPECT(status, call), TRUE(strstr(leank_last_error(), text)))

static float keys[TOKENS * KV_ROW], values[TOKENS * KV_ROW];

/* Head 0 of each layer keeps 3 channels, head 1 is dead. */
static const uint32_t COUNTS[LAYERS * KV_HEADS] = {3, 0, 3, 0};
static const uint16_t CHANNELS[] = {0, 5, 63, 1, 2, 3};

static leank_kept kept_lists(void)
{
    leank_kept kept = {LAYERS, KV_HEADS, HEAD_DIM, COUNTS, LAYERS * KV_HEADS, CHANNELS, 6};
    return kept;
}

static leank_config config_with(const leank_mask *mask)
{
    leank_config config;
    OK(leank_config_init(&config, sizeof config));
    config.layers = LAYERS, config.query_heads = QUERY_HEADS, config.kv_heads = KV_HEADS;
    config.head_dim = HEAD_DIM, config.mask = mask;
    config.dtype = LEANK_F32;
    return config;
}

static leank_status append_at(leank_cache *cache, size_t layer, size_t tokens)
{
    leank_view k = leank_contiguous(keys, LEANK_F32, tokens, KV_HEADS, HEAD_DIM);
    leank_view v = leank_contiguous(values, LEANK_F32, tokens, KV_HEADS, HEAD_DIM);
    return leank_cache_append(cache, layer, &k, &v);
}

/* A step that stores. */
static void store(leank_cache *cache, leank_sequence sequence, size_t tokens)
{
    leank_entry entry = {sequence, tokens, 0};
    OK(leank_cache_plan(cache, &entry, 1));
    for (size_t layer = 0; layer < LAYERS; layer++) OK(append_at(cache, layer, tokens));
    OK(leank_cache_commit(cache));
}

/* What one more token sees in the last layer, without keeping it. */
static void look(leank_cache *cache, leank_sequence sequence, float *out)
{
    leank_entry entry = {sequence, 1, 1};
    leank_view q = leank_contiguous(keys + 7, LEANK_F32, 1, QUERY_HEADS, HEAD_DIM);
    leank_view_mut to = leank_contiguous_mut(out, LEANK_F32, 1, QUERY_HEADS, HEAD_DIM);
    OK(leank_cache_plan(cache, &entry, 1));
    OK(append_at(cache, LAYERS - 1, 1));
    OK(leank_cache_attend(cache, LAYERS - 1, &q, &to));
    OK(leank_cache_cancel(cache));
}

static size_t length(const leank_cache *cache, leank_sequence sequence)
{
    size_t tokens = 0;
    OK(leank_cache_sequence_len(cache, sequence, &tokens));
    return tokens;
}

static void masks(void)
{
    leank_kept kept = kept_lists();
    uint32_t counts[LAYERS * KV_HEADS] = {3, 0, 2, 0};
    uint16_t channels[] = {0, 5, 64, 1, 2, 3};
    leank_mask_info info;
    leank_mask *mask;

    OK(leank_mask_create(&kept, &mask));
    OK(leank_mask_get_info(mask, &info, sizeof info));
    TRUE(info.layers == LAYERS && info.kv_heads == KV_HEADS && info.head_dim == HEAD_DIM);
    TRUE(info.sink == LEANK_AUTO && info.recent == LEANK_AUTO && info.model_id == NULL);
    TRUE(info.dead_heads == 2 && info.kept_k == 6.0 / 256 && info.kept_v == 0.5);
    TRUE(info.middle_bytes == (info.kept_k + info.kept_v) / 2);
    SAYS(LEANK_INVALID, leank_mask_get_info(mask, NULL, sizeof info), "NULL");
    SAYS(LEANK_INVALID, leank_mask_get_info(NULL, &info, sizeof info), "mask");
    leank_mask_free(mask);
    leank_mask_free(NULL);

    kept.counts = counts;
    SAYS(LEANK_MISMATCH, leank_mask_create(&kept, &mask), "kept channels");
    TRUE(mask == NULL);
    kept = kept_lists(), kept.channels = channels;
    SAYS(LEANK_INVALID, leank_mask_create(&kept, &mask), "64");
    kept.channels = NULL;
    SAYS(LEANK_INVALID, leank_mask_create(&kept, &mask), "NULL");
    kept = kept_lists(), kept.counts_len = 3;
    SAYS(LEANK_MISMATCH, leank_mask_create(&kept, &mask), "counts");
    kept = kept_lists(), kept.layers = SIZE_MAX, kept.kv_heads = 3;
    SAYS(LEANK_INVALID, leank_mask_create(&kept, &mask), "layers");
    SAYS(LEANK_INVALID, leank_mask_create(NULL, &mask), "NULL");
    EXPECT(LEANK_INVALID, leank_mask_create(&kept, NULL));
    SAYS(LEANK_INVALID, leank_mask_read(NULL, &mask), "path");
    SAYS(LEANK_INVALID, leank_mask_read("\xff", &mask), "UTF-8");
    SAYS(LEANK_UNAVAILABLE, leank_mask_read("mask.safetensors", &mask), "capi-files");
}

static void configurations(const leank_mask *mask)
{
    leank_config config = config_with(mask);
    leank_head_format formats[LAYERS * KV_HEADS] = {{1, 2}, {1, 2}, {1, 2}, {1, 2}};
    leank_footprint footprint;
    leank_cache *cache;
    size_t tokens;

    TRUE(config.sink == LEANK_AUTO && config.recent == LEANK_AUTO && config.limit == LEANK_NO_LIMIT);
    TRUE(config.block == 64 && config.scale == 0 && config.soft_cap == 0 && config.lean_formats == NULL);
    OK(leank_config_footprint(&config, TOKENS, &footprint, sizeof footprint));
    TRUE(footprint.bytes < footprint.dense_bytes && footprint.bytes <= footprint.peak_bytes);
    TRUE(footprint.dense_bytes == (uint64_t)2 * LAYERS * KV_ROW * 4 * TOKENS);
    OK(leank_config_tokens_within(&config, footprint.peak_bytes, &tokens));
    TRUE(tokens >= TOKENS && tokens < TOKENS + 2 * BLOCK);
    OK(leank_config_tokens_within(&config, UINT64_MAX, &tokens));
    TRUE(tokens == (size_t)LEANK_MAX_TOKENS);
    SAYS(LEANK_INVALID, leank_config_footprint(&config, SIZE_MAX, &footprint, sizeof footprint), "context length");
    SAYS(LEANK_INVALID, leank_config_footprint(&config, 1, NULL, sizeof footprint), "NULL");
    SAYS(LEANK_INVALID, leank_config_tokens_within(&config, 1, NULL), "NULL");

    /* Every option reaches what it names. */
    uint64_t with_f32 = footprint.bytes;
    config.lean_formats = formats, config.lean_formats_len = LAYERS * KV_HEADS;
    OK(leank_config_footprint(&config, TOKENS, &footprint, sizeof footprint));
    TRUE(footprint.bytes < with_f32);
    uint64_t with_plain = footprint.bytes;
    for (int i = 0; i < LAYERS * KV_HEADS; i++) formats[i].k = LEANK_INT8, formats[i].v = LEANK_INT4;
    OK(leank_config_footprint(&config, TOKENS, &footprint, sizeof footprint));
    TRUE(footprint.bytes < with_plain);
    config.lean_formats_len = 3;
    SAYS(LEANK_MISMATCH, leank_cache_create(NULL, &config, &cache), "formats");
    formats[2].v = 77, config.lean_formats_len = 4;
    SAYS(LEANK_INVALID, leank_cache_create(NULL, &config, &cache), "77");
    config = config_with(mask), config.recent = LEANK_EVERYTHING;
    OK(leank_config_footprint(&config, TOKENS, &footprint, sizeof footprint));
    TRUE(footprint.bytes == footprint.dense_bytes);
    config = config_with(NULL); /* dense */
    OK(leank_config_footprint(&config, TOKENS, &footprint, sizeof footprint));
    TRUE(footprint.bytes == footprint.dense_bytes);
    config = config_with(mask), config.sink = TOKENS;
    OK(leank_config_footprint(&config, TOKENS, &footprint, sizeof footprint));
    TRUE(footprint.bytes == footprint.dense_bytes);

#define WRONG(status, field, value, text)                                                                     \
    (config = config_with(mask), config.field = value,                                                        \
     SAYS(status, leank_cache_create(NULL, &config, &cache), text), TRUE(cache == NULL))
    WRONG(LEANK_INVALID, layers, 0, "layers");
    WRONG(LEANK_INVALID, layers, SIZE_MAX, "layers");
    WRONG(LEANK_MISMATCH, layers, 3, "layers");
    WRONG(LEANK_INVALID, query_heads, 3, "query heads");
    WRONG(LEANK_MISMATCH, kv_heads, 1, "KV heads");
    WRONG(LEANK_INVALID, head_dim, 0, "head_dim");
    WRONG(LEANK_INVALID, dtype, 3, "LEANK_BF16");
    WRONG(LEANK_INVALID, dtype, -1, "-1");
    WRONG(LEANK_INVALID, block, 0, "block");
    WRONG(LEANK_INVALID, block, 5000, "block");
    WRONG(LEANK_INVALID, scale, -1, "scale");
    WRONG(LEANK_INVALID, scale, 0.0f / (float)(config.block - config.block), "NaN");
    WRONG(LEANK_INVALID, soft_cap, -2, "soft-cap");
    config = config_with(NULL), config.layers = config.query_heads = config.kv_heads = 16384;
    SAYS(LEANK_INVALID, leank_cache_create(NULL, &config, &cache), "KV heads");
    SAYS(LEANK_INVALID, leank_cache_create(NULL, NULL, &cache), "NULL");
    config = config_with(mask);
    EXPECT(LEANK_INVALID, leank_cache_create(NULL, &config, NULL));

    /* A header newer than the library: more options, at their defaults or not. */
    struct {
        leank_config known;
        uint64_t unknown;
    } newer;
    memset(&newer, 0xff, sizeof newer);
    OK(leank_config_init(&newer.known, sizeof newer));
    TRUE(newer.unknown == 0 && newer.known.struct_size == sizeof newer);
    newer.known.layers = LAYERS, newer.known.query_heads = newer.known.kv_heads = 1, newer.known.head_dim = 8;
    OK(leank_cache_create(NULL, &newer.known, &cache));
    leank_cache_free(cache);
    newer.unknown = 1;
    SAYS(LEANK_UNAVAILABLE, leank_cache_create(NULL, &newer.known, &cache), "newer");
    newer.known.struct_size = 8;
    SAYS(LEANK_INVALID, leank_cache_create(NULL, &newer.known, &cache), "_init");
    EXPECT(LEANK_INVALID, leank_config_init(&config, 8));
    EXPECT(LEANK_INVALID, leank_config_init(NULL, sizeof config));
}

typedef struct {
    size_t runs, pieces;
} counter;

/* An executor: one piece after the other, the last one first. */
static void backwards(void *user, size_t count, void (*piece)(void *context, size_t i), void *context)
{
    counter *counted = (counter *)user;
    counted->runs++, counted->pieces += count;
    while (count-- > 0) piece(context, count);
}

static void backends(const leank_mask *mask)
{
    static const char *const NAMES[] = {"portable", "avx2", "avx512", "avx512-bf16", "neon"};
    leank_config config = config_with(mask);
    leank_backend_options options;
    leank_backend *backend;
    leank_cache *cache;
    leank_sequence sequence;
    float expected[Q_ROW], found[Q_ROW];
    counter counted = {0, 0};

    TRUE(strstr(leank_backend_name(NULL), "1 thread)"));
    /* On one thread, on a pool, on our own: the same bits. */
    for (int way = 0; way < 3; way++) {
        OK(leank_backend_options_init(&options, sizeof options));
        TRUE(options.threads == 1 && options.spin_ns == 100000 && options.isa == NULL && options.run == NULL);
        options.threads = way == 0 ? 0 : 3;
        if (way == 2) options.run = backwards, options.user = &counted;
        OK(leank_backend_create(&options, &backend));
        TRUE(strstr(leank_backend_name(backend), way == 0 ? "1 thread)" : "3 threads"));
        config.recent = LEANK_EVERYTHING;
        OK(leank_cache_create(backend, &config, &cache));
        leank_backend_free(backend); /* The cache keeps what it needs. */
        OK(leank_cache_add_sequence(cache, &sequence));
        store(cache, sequence, TOKENS);
        look(cache, sequence, way == 0 ? expected : found);
        if (way > 0) TRUE(memcmp(expected, found, sizeof expected) == 0);
        leank_cache_free(cache);
    }
    TRUE(counted.runs >= 1 && counted.pieces > 2);

    /* Codes instead of plain elements: nearly the same, for fewer bytes. */
    leank_head_format formats[LAYERS * KV_HEADS];
    for (int i = 0; i < LAYERS * KV_HEADS; i++) formats[i].k = LEANK_INT8, formats[i].v = LEANK_INT8;
    uint64_t bytes[2] = {0, 0};
    for (int coded = 0; coded < 2; coded++) {
        leank_memory memory;
        config = config_with(mask);
        if (coded) config.lean_formats = formats, config.lean_formats_len = LAYERS * KV_HEADS;
        OK(leank_cache_create(NULL, &config, &cache));
        OK(leank_cache_add_sequence(cache, &sequence));
        store(cache, sequence, TOKENS);
        look(cache, sequence, coded ? found : expected);
        OK(leank_cache_memory(cache, &memory, sizeof memory));
        bytes[coded] = memory.lean_bytes;
        leank_cache_free(cache);
    }
    TRUE(0 < bytes[1] && bytes[1] < bytes[0] / 2);
    TRUE(memcmp(expected, found, sizeof expected) != 0);
    for (int i = 0; i < Q_ROW; i++) {
        float difference = found[i] - expected[i];
        TRUE(-0.02f < difference && difference < 0.02f);
    }

    /* Every instruction set can be forced, or is told to be missing. */
    size_t available = 0;
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        OK(leank_backend_options_init(&options, sizeof options));
        options.isa = NAMES[i];
        leank_status status = leank_backend_create(&options, &backend);
        if (status == LEANK_OK) {
            available++;
            TRUE(strstr(leank_backend_name(backend), NAMES[i]));
        } else {
            SAYS(LEANK_UNAVAILABLE, status, NAMES[i]);
            TRUE(backend == NULL && i > 0);
        }
        leank_backend_free(backend);
    }
    TRUE(available > 0);
    options.isa = "sse9";
    SAYS(LEANK_INVALID, leank_backend_create(&options, &backend), "sse9");
    options.isa = NULL, options.threads = 1 << 20;
    SAYS(LEANK_INVALID, leank_backend_create(&options, &backend), "threads");
    SAYS(LEANK_INVALID, leank_backend_create(NULL, &backend), "NULL");
    EXPECT(LEANK_INVALID, leank_backend_create(&options, NULL));
    EXPECT(LEANK_INVALID, leank_backend_options_init(NULL, sizeof options));
}

static void steps(const leank_mask *mask)
{
    static float q[3 * Q_ROW], out[3 * Q_ROW];
    static uint16_t half_out[3 * Q_ROW];
    leank_config config = config_with(mask);
    leank_cache *cache;
    leank_sequence first, second;
    leank_memory memory;

    OK(leank_cache_create(NULL, &config, &cache));
    OK(leank_cache_add_sequence(cache, &first));
    OK(leank_cache_add_sequence(cache, &second));
    EXPECT(LEANK_INVALID, leank_cache_add_sequence(cache, NULL));
    EXPECT(LEANK_INVALID, leank_cache_add_sequence(NULL, &first));

    /* Out of order. */
    SAYS(LEANK_ORDER, append_at(cache, 0, 1), "append");
    SAYS(LEANK_ORDER, leank_cache_commit(cache), "commit");
    OK(leank_cache_cancel(cache));

    leank_entry entries[2] = {{first, 2, 1}, {second, 1, 0}};
    SAYS(LEANK_INVALID, leank_cache_plan(cache, entries, 0), "no sequence");
    SAYS(LEANK_INVALID, leank_cache_plan(cache, NULL, 2), "NULL");
    SAYS(LEANK_INVALID, leank_cache_plan(cache, entries, SIZE_MAX), "memory");
    entries[0].tokens = 0;
    EXPECT(LEANK_INVALID, leank_cache_plan(cache, entries, 2));
    entries[0].tokens = SIZE_MAX;
    EXPECT(LEANK_INVALID, leank_cache_plan(cache, entries, 2));
    entries[0].tokens = 2, entries[1].sequence = first;
    SAYS(LEANK_INVALID, leank_cache_plan(cache, entries, 2), "twice");
    entries[1].sequence = 99;
    SAYS(LEANK_UNKNOWN_SEQUENCE, leank_cache_plan(cache, entries, 2), "99");
    entries[1].sequence = second;
    OK(leank_cache_plan(cache, entries, 2));
    EXPECT(LEANK_ORDER, leank_cache_plan(cache, entries, 2));
    EXPECT(LEANK_ORDER, leank_cache_release(cache, first));

    leank_view k = leank_contiguous(keys, LEANK_F32, 3, KV_HEADS, HEAD_DIM), wrong = k;
    leank_view query = leank_contiguous(q, LEANK_F32, 3, QUERY_HEADS, HEAD_DIM);
    leank_view_mut to = leank_contiguous_mut(out, LEANK_F32, 3, QUERY_HEADS, HEAD_DIM), bad = to;
    SAYS(LEANK_ORDER, leank_cache_attend(cache, 0, &query, &to), "before append");
    SAYS(LEANK_MISMATCH, leank_cache_append(cache, LAYERS, &k, &k), "layer");
    SAYS(LEANK_INVALID, leank_cache_append(cache, 0, NULL, &k), "view of K");
    SAYS(LEANK_INVALID, leank_cache_append(cache, 0, &k, NULL), "view of V");
    wrong.data = NULL;
    SAYS(LEANK_INVALID, leank_cache_append(cache, 0, &wrong, &k), "NULL");
    wrong.data = (const char *)keys + 1;
    SAYS(LEANK_INVALID, leank_cache_append(cache, 0, &k, &wrong), "multiple of 4");
    wrong = k, wrong.dtype = 9;
    SAYS(LEANK_INVALID, leank_cache_append(cache, 0, &k, &wrong), "9");
    wrong = k, wrong.token_stride = SIZE_MAX;
    SAYS(LEANK_INVALID, leank_cache_append(cache, 0, &k, &wrong), "memory");
    wrong = k, wrong.token_stride = SIZE_MAX / 8;
    SAYS(LEANK_INVALID, leank_cache_append(cache, 0, &k, &wrong), "memory");
    wrong = k, wrong.tokens = 2;
    SAYS(LEANK_MISMATCH, leank_cache_append(cache, 0, &k, &wrong), "V of a step");
    wrong = k, wrong.tokens = 0, wrong.data = NULL;
    SAYS(LEANK_MISMATCH, leank_cache_append(cache, 0, &wrong, &k), "K of a step");

    OK(leank_cache_append(cache, 0, &k, &k));
    SAYS(LEANK_ORDER, leank_cache_commit(cache), "layer 1");
    bad.data = q;
    SAYS(LEANK_INVALID, leank_cache_attend(cache, 0, &query, &bad), "overlap");
    SAYS(LEANK_MISMATCH, leank_cache_attend(cache, 0, &k, &to), "q of a step");
    SAYS(LEANK_INVALID, leank_cache_attend(cache, 0, &query, NULL), "output");
    SAYS(LEANK_INVALID, leank_cache_attend(cache, 0, NULL, &to), "view of q");

    /* The row of a sequence that only stores is neither read nor written: q has two, strides and types
     * are free. With one token seen, the output is its V. */
    for (size_t i = 0; i < 3 * Q_ROW; i++) out[i] = -7, half_out[i] = 0x1234;
    leank_view_mut head_major = to;
    head_major.token_stride = HEAD_DIM, head_major.head_stride = 3 * HEAD_DIM;
    query.token_stride = 0;
    OK(leank_cache_attend(cache, 0, &query, &head_major));
    for (size_t h = 0; h < QUERY_HEADS; h++) {
        const float *rows = out + h * 3 * HEAD_DIM, *seen = keys + h / 2 * HEAD_DIM;
        TRUE(memcmp(rows, seen, sizeof(float) * HEAD_DIM) == 0);
        TRUE(rows[HEAD_DIM] != -7 && rows[2 * HEAD_DIM] == -7 && rows[3 * HEAD_DIM - 1] == -7);
    }
    leank_view_mut halves = to;
    halves.data = half_out, halves.dtype = LEANK_F16;
    OK(leank_cache_attend(cache, 0, &query, &halves));
    TRUE(half_out[0] == 0x3c00 && half_out[2 * Q_ROW] == 0x1234); /* keys[0] is 1 */
    OK(leank_cache_append(cache, 1, &k, &k));
    OK(leank_cache_commit(cache));
    TRUE(length(cache, first) == 2 && length(cache, second) == 1);

    OK(leank_cache_memory(cache, &memory, sizeof memory));
    TRUE(memory.tokens == 3 && memory.full_blocks == 2 && memory.lean_blocks == 0 && memory.lean_bytes == 0);
    TRUE(memory.dense_bytes == (uint64_t)2 * LAYERS * KV_ROW * 4 * 3 && memory.allocated_bytes == memory.full_bytes);
    EXPECT(LEANK_INVALID, leank_cache_memory(cache, NULL, sizeof memory));
    EXPECT(LEANK_INVALID, leank_cache_memory(cache, &memory, 0));
    /* A caller whose header is older takes the first fields only. */
    memory.full_blocks = 99;
    OK(leank_cache_memory(cache, &memory, sizeof memory.tokens));
    TRUE(memory.tokens == 3 && memory.full_blocks == 99);
    leank_cache_free(cache);
    leank_cache_free(NULL);

    /* Scale and soft-cap reach the logits. */
    float plain[Q_ROW], other[Q_ROW];
    for (int way = 0; way < 3; way++) {
        config = config_with(mask);
        if (way == 1) config.scale = 3;
        if (way == 2) config.soft_cap = 0.01f;
        OK(leank_cache_create(NULL, &config, &cache));
        OK(leank_cache_add_sequence(cache, &first));
        store(cache, first, 100);
        look(cache, first, way == 0 ? plain : other);
        if (way > 0) TRUE(memcmp(plain, other, sizeof plain) != 0);
        leank_cache_free(cache);
    }
}

static void lives(const leank_mask *mask)
{
    leank_config config = config_with(mask);
    leank_memory memory;
    leank_cache *cache;
    leank_sequence sequence, twin;
    size_t below, above;
    float expected[Q_ROW], found[Q_ROW];

    OK(leank_cache_create(NULL, &config, &cache));
    OK(leank_cache_add_sequence(cache, &sequence));
    store(cache, sequence, 1000);
    look(cache, sequence, expected);
    OK(leank_cache_fork(cache, sequence, &twin));
    TRUE(twin != sequence);
    store(cache, sequence, 10);
    look(cache, twin, found);
    TRUE(memcmp(expected, found, sizeof expected) == 0);
    OK(leank_cache_memory(cache, &memory, sizeof memory));
    TRUE(memory.tokens == 2010 && memory.lean_blocks > 0);
    TRUE(memory.full_bytes > memory.lean_bytes && memory.lean_bytes > 0);

    SAYS(LEANK_INVALID, leank_cache_truncate(cache, twin, 100), "64 and 128");
    OK(leank_cache_nearest_lengths(cache, twin, 100, &below, &above));
    TRUE(below == 64 && above == 128);
    EXPECT(LEANK_INVALID, leank_cache_nearest_lengths(cache, twin, 100, NULL, &above));
    EXPECT(LEANK_INVALID, leank_cache_nearest_lengths(cache, twin, 1001, &below, &above));
    EXPECT(LEANK_UNKNOWN_SEQUENCE, leank_cache_nearest_lengths(cache, 77, 1, &below, &above));
    SAYS(LEANK_INVALID, leank_cache_truncate(cache, twin, 1001), "1000");
    TRUE(length(cache, twin) == 1000);
    OK(leank_cache_truncate(cache, twin, 128));
    TRUE(length(cache, twin) == 128 && length(cache, sequence) == 1010);
    OK(leank_cache_release(cache, twin));
    EXPECT(LEANK_UNKNOWN_SEQUENCE, leank_cache_release(cache, twin));
    EXPECT(LEANK_UNKNOWN_SEQUENCE, leank_cache_truncate(cache, twin, 0));
    EXPECT(LEANK_UNKNOWN_SEQUENCE, leank_cache_fork(cache, twin, &twin));
    EXPECT(LEANK_UNKNOWN_SEQUENCE, leank_cache_sequence_len(cache, twin, &below));
    EXPECT(LEANK_INVALID, leank_cache_fork(cache, sequence, NULL));
    EXPECT(LEANK_INVALID, leank_cache_sequence_len(cache, sequence, NULL));
    leank_cache_free(cache);

    /* A limit tells what is missing, to the byte. */
    config.limit = (uint64_t)LAYERS * 2 * KV_ROW * BLOCK * 4 + 1000;
    OK(leank_cache_create(NULL, &config, &cache));
    OK(leank_cache_add_sequence(cache, &sequence));
    leank_entry entry = {sequence, BLOCK + 1, 1};
    SAYS(LEANK_MEMORY_LIMIT, leank_cache_plan(cache, &entry, 1), "missing");
    TRUE(leank_last_error_bytes() == (uint64_t)LAYERS * 2 * KV_ROW * BLOCK * 4 - 1000);
    EXPECT(LEANK_INVALID, leank_cache_plan(NULL, &entry, 1));
    TRUE(leank_last_error_bytes() == 0);
    store(cache, sequence, BLOCK);
    leank_cache_free(cache);
}

/* A file in memory that gives and takes little at a time. */
typedef struct {
    unsigned char bytes[1 << 21];
    size_t len, at, fails_at, most;
} file;

static ptrdiff_t write_some(void *user, const void *data, size_t len)
{
    file *to = (file *)user;
    size_t some = len < to->most ? len : to->most;
    if (to->at >= to->fails_at || to->at + some > sizeof to->bytes) return -1;
    memcpy(to->bytes + to->at, data, some);
    to->len = to->at += some;
    return (ptrdiff_t)some;
}

static ptrdiff_t read_some(void *user, void *data, size_t len)
{
    file *from = (file *)user;
    size_t some = len < from->most ? len : from->most, left = from->len - from->at;
    if (from->at >= from->fails_at) return -5;
    if (some > left) some = left;
    memcpy(data, from->bytes + from->at, some);
    from->at += some;
    return (ptrdiff_t)some;
}

static ptrdiff_t too_much(void *user, const void *data, size_t len)
{
    (void)user, (void)data;
    return (ptrdiff_t)len + 1;
}

static ptrdiff_t nothing(void *user, const void *data, size_t len)
{
    (void)user, (void)data, (void)len;
    return 0;
}

static void files(const leank_mask *mask)
{
    static file saved;
    leank_config config = config_with(mask);
    leank_cache *cache, *other;
    leank_sequence sequence, restored;
    leank_memory before, after;
    float expected[Q_ROW], found[Q_ROW];

    OK(leank_cache_create(NULL, &config, &cache));
    OK(leank_cache_add_sequence(cache, &sequence));
    store(cache, sequence, 300);
    saved.fails_at = SIZE_MAX, saved.most = 1000;
    OK(leank_cache_save(cache, sequence, write_some, &saved));
    saved.bytes[saved.len++] = 42; /* Somebody else's. */
    saved.at = 0;
    OK(leank_cache_restore(cache, read_some, &saved, &restored));
    TRUE(saved.at == saved.len - 1 && length(cache, restored) == 300);
    look(cache, sequence, expected);
    look(cache, restored, found);
    TRUE(memcmp(expected, found, sizeof expected) == 0);

    OK(leank_cache_memory(cache, &before, sizeof before));
    saved.at = 0, saved.fails_at = 5000;
    SAYS(LEANK_IO, leank_cache_restore(cache, read_some, &saved, &restored), "-5");
    saved.at = 0, saved.fails_at = SIZE_MAX, saved.bytes[saved.len / 2] ^= 1;
    SAYS(LEANK_FORMAT, leank_cache_restore(cache, read_some, &saved, &restored), "damaged");
    saved.at = 0, saved.len /= 3;
    SAYS(LEANK_FORMAT, leank_cache_restore(cache, read_some, &saved, &restored), "ends in");
    OK(leank_cache_memory(cache, &after, sizeof after));
    TRUE(before.tokens == after.tokens && before.full_bytes == after.full_bytes);
    config.recent = 200;
    OK(leank_cache_create(NULL, &config, &other));
    saved.at = 0;
    EXPECT(LEANK_MISMATCH, leank_cache_restore(other, read_some, &saved, &restored));
    leank_cache_free(other);

    saved.at = 0, saved.fails_at = 2000;
    SAYS(LEANK_IO, leank_cache_save(cache, sequence, write_some, &saved), "-1");
    SAYS(LEANK_IO, leank_cache_save(cache, sequence, too_much, NULL), "answered");
    EXPECT(LEANK_IO, leank_cache_save(cache, sequence, nothing, NULL));
    SAYS(LEANK_INVALID, leank_cache_save(cache, sequence, NULL, NULL), "callback");
    SAYS(LEANK_INVALID, leank_cache_restore(cache, NULL, NULL, &restored), "callback");
    EXPECT(LEANK_INVALID, leank_cache_restore(cache, read_some, &saved, NULL));
    EXPECT(LEANK_UNKNOWN_SEQUENCE, leank_cache_save(cache, 99, write_some, &saved));
    leank_cache_free(cache);
}

/* Calls without the cache that they are about. */
static void nobody(void)
{
    leank_sequence sequence = 0;
    leank_memory memory;
    leank_view view = leank_contiguous(keys, LEANK_F32, 1, KV_HEADS, HEAD_DIM);
    leank_view_mut to = leank_contiguous_mut(values, LEANK_F32, 1, KV_HEADS, HEAD_DIM);
    size_t tokens;
    SAYS(LEANK_INVALID, leank_cache_sequence_len(NULL, sequence, &tokens), "cache");
    EXPECT(LEANK_INVALID, leank_cache_fork(NULL, sequence, &sequence));
    EXPECT(LEANK_INVALID, leank_cache_truncate(NULL, sequence, 0));
    EXPECT(LEANK_INVALID, leank_cache_nearest_lengths(NULL, sequence, 0, &tokens, &tokens));
    EXPECT(LEANK_INVALID, leank_cache_release(NULL, sequence));
    EXPECT(LEANK_INVALID, leank_cache_append(NULL, 0, &view, &view));
    EXPECT(LEANK_INVALID, leank_cache_attend(NULL, 0, &view, &to));
    EXPECT(LEANK_INVALID, leank_cache_commit(NULL));
    EXPECT(LEANK_INVALID, leank_cache_cancel(NULL));
    EXPECT(LEANK_INVALID, leank_cache_memory(NULL, &memory, sizeof memory));
    EXPECT(LEANK_INVALID, leank_cache_save(NULL, sequence, write_some, NULL));
    EXPECT(LEANK_INVALID, leank_cache_restore(NULL, read_some, NULL, &sequence));
    leank_backend_free(NULL);
}

int main(void)
{
    leank_kept kept = kept_lists();
    leank_mask *mask;

    TRUE(strcmp(leank_last_error(), "") == 0 && leank_last_error_bytes() == 0);
    TRUE(strcmp(leank_status_name(LEANK_ORDER), "LEANK_ORDER") == 0);
    TRUE(strcmp(leank_status_name(-3), "unknown") == 0);
    for (size_t i = 0; i < TOKENS * KV_ROW; i++) {
        keys[i] = (float)((uint32_t)i * 2654435761u >> 8) / (1 << 23) - 1;
        values[i] = (float)((uint32_t)i * 2246822519u >> 8) / (1 << 23) - 1;
    }
    keys[0] = 1;
    OK(leank_mask_create(&kept, &mask));
    masks();
    configurations(mask);
    backends(mask);
    steps(mask);
    lives(mask);
    files(mask);
    nobody();
    leank_mask_free(mask);
    printf("leank %s: %d failures\n", leank_version(), failures);
    return failures != 0;
}
