/*
 * leank.h: a lean KV cache in host memory and its decode attention, for runtimes in C and C++.
 *
 * The keys of most attention heads can be stored without most of their channels (LeanK, arXiv
 * 2508.02215). Which ones are kept is learned once per model: the mask. The first tokens of a
 * sequence (the sink) and its last ones (the recent window) are always kept whole.
 *
 *     leank_config config;
 *     leank_config_init(&config, sizeof config);
 *     config.layers = 32, config.query_heads = 32, config.kv_heads = 8, config.head_dim = 128;
 *     config.mask = mask;
 *     leank_cache_create(backend, &config, &cache);
 *     leank_cache_add_sequence(cache, &sequence);
 *
 *     // a step: plan, then per layer append and attend, then commit
 *     leank_entry entry = {sequence, tokens, 1};
 *     leank_cache_plan(cache, &entry, 1);
 *     for (size_t layer = 0; layer < 32; layer++) {
 *         leank_cache_append(cache, layer, &k, &v);   // K after RoPE
 *         leank_cache_attend(cache, layer, &q, &out); // q after RoPE
 *     }
 *     leank_cache_commit(cache);
 *
 * A whole program is examples/embed.c. C99 or newer, C++11 or newer; 64-bit machines.
 *
 * Words. A query head reads the KV head of its group: query head h reads KV head h / (query_heads /
 * kv_heads). A channel is an index below head_dim. A head that keeps no channel is dead: outside
 * the windows neither its K nor its V is stored. Tokens come in blocks; a block is full, or lean
 * once all its tokens are neither of the sink nor of the recent window.
 *
 * Errors. Functions that can fail return a leank_status; leank_last_error() tells the rest. After
 * an error nothing has changed, and what a function would have answered is not written (handles:
 * NULL), unless its comment says otherwise. Wrong numbers, NULL, unknown values, views of the wrong
 * shape and calls out of order are errors, never undefined. What cannot be checked is yours to
 * keep: pointers point to as much memory as was said, handles come from this library and are not
 * yet freed, strings end with a NUL. Where the system has no memory left for small things (not
 * blocks of a cache), the process ends, as in any Rust program.
 *
 * Threads. Different objects can be used on different threads at the same time. A cache is used by
 * one thread at a time, any thread; a second one (or a callback) that comes meanwhile is told
 * LEANK_BUSY. Backends and masks never change and can be shared freely.
 *
 * Ownership. What is handed in is copied or only read during the call. What a _create or _read
 * function answers is yours to _free, in any order: a cache holds what it needs of its backend and
 * mask.
 *
 * Versions. Functions and fields are only added. Options start with struct_size, which their _init
 * sets; answers that may grow are taken with their sizeof. So a program runs with a newer library,
 * and with an older one as long as it leaves new options at their defaults.
 */
#ifndef LEANK_H
#define LEANK_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Errors and versions --------------------------------------------------------------------- */

typedef enum leank_status {
    LEANK_OK = 0,
    /* An argument is wrong whatever it is used with: NULL, an unknown value, a bad number. */
    LEANK_INVALID = 1,
    /* An argument does not fit the thing it is used with: views of another shape, a mask or a saved
     * sequence of another model. */
    LEANK_MISMATCH = 2,
    /* The cache does not hold the sequence (any more). */
    LEANK_UNKNOWN_SEQUENCE = 3,
    /* The call belongs at another place: between plan and commit, or outside. */
    LEANK_ORDER = 4,
    /* The limit of the cache stands against it; leank_last_error_bytes() says how many bytes are
     * missing. Release sequences, or plan a smaller step. */
    LEANK_MEMORY_LIMIT = 5,
    /* The system refused memory for blocks: leank_last_error_bytes() of it. */
    LEANK_SYSTEM_MEMORY = 6,
    /* This CPU, system or build of the library does not have it. The only status after which it
     * makes sense to ask for something else instead. */
    LEANK_UNAVAILABLE = 7,
    /* A file or a saved sequence that is damaged, cut short or none. */
    LEANK_FORMAT = 8,
    /* Reading or writing failed: the system, or a callback, said so. */
    LEANK_IO = 9,
    /* Another thread is using the cache, or a callback came back to it. */
    LEANK_BUSY = 10,
    /* A bug in the library or in a callback was caught. The cache in use then answers nothing else
     * any more: free it. */
    LEANK_INTERNAL = 11,
    LEANK_STATUS_IS_INT32 = 0x7fffffff /* not a status */
} leank_status;

/* The name of a status, e.g. "LEANK_ORDER"; "unknown" for other numbers. */
const char *leank_status_name(int32_t status);

/* What went wrong in the last call on this thread that failed: the thing, what was expected, what
 * was found, the mend. Empty if none has. Valid until the next call that fails on this thread. */
const char *leank_last_error(void);

/* Bytes that were missing when the last call on this thread that failed said LEANK_MEMORY_LIMIT or
 * LEANK_SYSTEM_MEMORY; 0 for any other status. */
uint64_t leank_last_error_bytes(void);

/* The version of the library, e.g. "0.1.0". */
const char *leank_version(void);

/* ---- Backend: what attention runs on --------------------------------------------------------- */

/* A kernel and threads. Caches may share it. Wherever one is asked for, NULL is the default one:
 * the best kernel of this CPU, on the calling thread. */
typedef struct leank_backend leank_backend;

/* Your own threads. Must call piece(context, i) exactly once for every i < count, in any order, on
 * any threads, and return when all these calls have returned. It is called by the thread that calls
 * leank_cache_append, _attend or _commit, while that uses the cache; by several at once where caches
 * share the backend.
 * No exception and no longjmp may leave it. */
typedef void (*leank_run)(void *user, size_t count, void (*piece)(void *context, size_t i),
                          void *context);

typedef struct leank_backend_options {
    size_t struct_size; /* set by leank_backend_options_init */
    /* Threads that attention runs on, the calling one included: 0 and 1 make none, more (up to
     * 1024) make a pool that wakes in less than a microsecond. With `run`: how many threads that
     * has. */
    size_t threads;
    /* How long threads of the pool spin for work before they sleep, in nanoseconds. Default 100000:
     * longer than what lies between two layers. Long spins cost the cycles of other work. */
    uint64_t spin_ns;
    /* "portable", "avx2", "avx512", "avx512-bf16", "neon", or NULL (default): the best of this
     * CPU. */
    const char *isa;
    /* Your own threads in place of the pool, or NULL (default). `user` is handed to it. Both are
     * used as long as the backend or a cache made with it lives. */
    leank_run run;
    void *user;
} leank_backend_options;

/* Sets the defaults. `size`: sizeof *options. */
leank_status leank_backend_options_init(leank_backend_options *options, size_t size);

/* LEANK_UNAVAILABLE for an instruction set that this CPU or this library lacks, and for more threads than the
 * system gives. */
leank_status leank_backend_create(const leank_backend_options *options, leank_backend **backend);

/* For logs, e.g. "cpu (avx2 kernel, 4 threads)". Valid until the backend is freed. */
const char *leank_backend_name(const leank_backend *backend);

/* NULL is allowed. */
void leank_backend_free(leank_backend *backend);

/* ---- Masks ----------------------------------------------------------------------------------- */

/* The kept channels of every KV head of a model. */
typedef struct leank_mask leank_mask;

/* Kept channels as lists. Head h of layer l has the number l * kv_heads + h. */
typedef struct leank_kept {
    size_t layers;
    size_t kv_heads;
    size_t head_dim; /* up to 4096 */
    /* How many channels each head keeps, [layers * kv_heads]; 0: a dead head. */
    const uint32_t *counts;
    size_t counts_len;
    /* The lists of all heads, one after the other, each strictly ascending. */
    const uint16_t *channels;
    size_t channels_len;
} leank_kept;

/* LEANK_INVALID for a list that does not ascend or a channel that is not below head_dim,
 * LEANK_MISMATCH for lengths that do not fit. */
leank_status leank_mask_create(const leank_kept *kept, leank_mask **mask);

/* Reads leank's own mask file (.safetensors; `leank convert` makes one of others). LEANK_IO,
 * LEANK_FORMAT; LEANK_UNAVAILABLE where the library was built without the feature `capi-files`.
 * `path` is UTF-8. Whether the mask was learned for your model is yours to compare, by model_id. */
leank_status leank_mask_read(const char *path, leank_mask **mask);

typedef struct leank_mask_info {
    size_t layers;
    size_t kv_heads;
    size_t head_dim;
    /* The windows that it was learned for; LEANK_AUTO where it does not say. */
    size_t sink;
    size_t recent;
    /* Shares of the dense model outside the windows: channels of K, V, and bytes of both (the dense
     * ones of 16 bits an element; blocks of 64 tokens, scales included, no padding). */
    double kept_k;
    double kept_v;
    double middle_bytes;
    /* Heads that keep no channel. */
    size_t dead_heads;
    /* The model it was learned for, as a name for people, or NULL. Valid until the mask is
     * freed. */
    const char *model_id;
} leank_mask_info;

/* `size`: sizeof *info. */
leank_status leank_mask_get_info(const leank_mask *mask, leank_mask_info *info, size_t size);

/* NULL is allowed. */
void leank_mask_free(leank_mask *mask);

/* ---- What a cache stores --------------------------------------------------------------------- */

/* Types of elements. */
typedef enum leank_dtype {
    LEANK_F32 = 0,
    LEANK_F16 = 1, /* IEEE half precision */
    LEANK_BF16 = 2 /* the upper half of an f32 */
} leank_dtype;

#define LEANK_AUTO (SIZE_MAX - 1)   /* of a window: the mask's, or else sink 32, recent 128 */
#define LEANK_EVERYTHING SIZE_MAX   /* of `recent`: nothing ever becomes lean */
#define LEANK_NO_LIMIT UINT64_MAX   /* of `limit` */
#define LEANK_MAX_TOKENS 4294967296 /* of one sequence */

/* Formats of lean blocks beside the types of elements: codes of 8 or 4 bits with scales. */
typedef enum leank_code_format {
    LEANK_INT8 = 3,
    LEANK_INT4 = 4
} leank_code_format;

/* Formats of K and V of one head in lean blocks: a leank_dtype or a leank_code_format each. */
typedef struct leank_head_format {
    int32_t k;
    int32_t v;
} leank_head_format;

typedef struct leank_config {
    size_t struct_size; /* set by leank_config_init */
    /* Attention shape of the model, to be set. query_heads is a multiple of kv_heads. */
    size_t layers;
    size_t query_heads;
    size_t kv_heads;
    size_t head_dim;
    /* NULL (default): every channel is kept, and then nothing becomes lean by LEANK_AUTO either. */
    const leank_mask *mask;
    /* Windows in tokens: the first ones of a sequence, and the last ones, the query's own included.
     * Default LEANK_AUTO. */
    size_t sink;
    size_t recent;
    /* Most bytes of block storage; a step that needs more is refused. Default LEANK_NO_LIMIT. */
    uint64_t limit;
    /* Formats of lean blocks, [layers * kv_heads] in the order of leank_kept, or NULL (default): what
     * the mask asks for, which is `dtype` where it asks for nothing. */
    const leank_head_format *lean_formats;
    size_t lean_formats_len;
    /* Type of what is stored, a leank_dtype. Default LEANK_F16. */
    int32_t dtype;
    /* Tokens per block, 1 to 4096. Default 64; multiples of 32 are fastest. */
    uint32_t block;
    /* Factor on q.k; 0 (default): 1/sqrt(head_dim), with the full head_dim whatever is kept. */
    float scale;
    /* Logits become soft_cap * tanh(logit / soft_cap); 0 (default): as they are. */
    float soft_cap;
} leank_config;

/* Sets the defaults. `size`: sizeof *config. */
leank_status leank_config_init(leank_config *config, size_t size);

typedef struct leank_footprint {
    /* Bytes of the blocks of one sequence between steps, and the most while it is decoded token by
     * token up to here. */
    uint64_t bytes;
    uint64_t peak_bytes;
    /* Bytes of a dense cache without padding. */
    uint64_t dense_bytes;
} leank_footprint;

/* What one sequence of `tokens` tokens will take, to the byte, before anything is made. `size`:
 * sizeof *footprint. */
leank_status leank_config_footprint(const leank_config *config, size_t tokens,
                                    leank_footprint *footprint, size_t size);

/* Most tokens of one sequence, decoded token by token, that never take more than `bytes`. */
leank_status leank_config_tokens_within(const leank_config *config, uint64_t bytes, size_t *tokens);

/* ---- Caches ---------------------------------------------------------------------------------- */

/* K and V of many sequences. */
typedef struct leank_cache leank_cache;

/* Names a sequence of one cache; never used again after its release. */
typedef uint64_t leank_sequence;

/* LEANK_INVALID or LEANK_MISMATCH for what does not fit together. Takes no memory for blocks
 * yet. */
leank_status leank_cache_create(const leank_backend *backend, const leank_config *config,
                                leank_cache **cache);

/* Frees the cache with all its sequences. NULL is allowed. Refused (see leank_last_error) while
 * another call uses the cache: then the cache stays. */
void leank_cache_free(leank_cache *cache);

/* A new, empty sequence. */
leank_status leank_cache_add_sequence(leank_cache *cache, leank_sequence *sequence);

/* Tokens of a sequence, without those of a step under way. */
leank_status leank_cache_sequence_len(const leank_cache *cache, leank_sequence sequence,
                                      size_t *tokens);

/* A new sequence with the same tokens, in the same blocks: it takes no bytes before one of the two
 * goes on. Outside of steps only. */
leank_status leank_cache_fork(leank_cache *cache, leank_sequence sequence, leank_sequence *twin);

/* Takes the last tokens back, so that `tokens` remain. LEANK_INVALID for more than there are and
 * for an end inside a lean block (leank_cache_nearest_lengths). Lean blocks that remain stay lean.
 * Outside of steps only. */
leank_status leank_cache_truncate(leank_cache *cache, leank_sequence sequence, size_t tokens);

/* The longest length up to `tokens` and the shortest from `tokens` on that a sequence can be cut
 * to: both `tokens`, or the two ends of the lean block around it. */
leank_status leank_cache_nearest_lengths(const leank_cache *cache, leank_sequence sequence,
                                         size_t tokens, size_t *below, size_t *above);

/* Forgets a sequence. Outside of steps only. */
leank_status leank_cache_release(leank_cache *cache, leank_sequence sequence);

/* ---- Steps ----------------------------------------------------------------------------------- */

/* What one sequence does in a step. */
typedef struct leank_entry {
    leank_sequence sequence;
    size_t tokens; /* new ones, at least 1 */
    /* Not 0: the new tokens attend. 0: they are only stored, as for a prompt whose attention you
     * compute yourself. */
    int32_t attend;
} leank_entry;

/* Activations [tokens, heads, head_dim] in your memory; strides in elements, the channels of a head
 * lie side by side. `data` is aligned to its elements. `tokens` are those of the step: the new ones
 * of all its sequences, one sequence after the other in the order of the plan. */
typedef struct leank_view {
    const void *data;
    int32_t dtype; /* a leank_dtype, whatever the cache stores */
    size_t tokens;
    size_t heads; /* KV heads of K and V, query heads of q and of the output */
    size_t head_dim;
    size_t token_stride; /* from one token to the next */
    size_t head_stride;  /* from one head to the next */
} leank_view;

/* The same, to be written. */
typedef struct leank_view_mut {
    void *data;
    int32_t dtype;
    size_t tokens;
    size_t heads;
    size_t head_dim;
    size_t token_stride;
    size_t head_stride;
} leank_view_mut;

/* Plans a step and reserves all the memory that it needs, in all layers. LEANK_MEMORY_LIMIT,
 * LEANK_SYSTEM_MEMORY; LEANK_INVALID for a sequence named twice and for 0 tokens. */
leank_status leank_cache_plan(leank_cache *cache, const leank_entry *entries, size_t count);

/* Stores K (after RoPE) and V of the step's tokens, rounded. After an error the step goes on:
 * append again, or cancel. Values that are not finite reach the queries that see them, and no other
 * head or sequence. */
leank_status leank_cache_append(leank_cache *cache, size_t layer, const leank_view *k,
                                const leank_view *v);

/* Attends: softmax(scale q.k) v over all that each new token sees, itself included. q after RoPE.
 * After the layer's append. Rows of sequences that only store are neither read nor written. Nobody
 * else may write the memory that q spans or touch the memory that `out` spans, from its first to
 * its last element, during the call; the two may not overlap. Results do not depend on the threads
 * or on the other sequences of the step. */
leank_status leank_cache_attend(leank_cache *cache, size_t layer, const leank_view *q,
                                const leank_view_mut *out);

/* Ends the step: its tokens count, and blocks that left the recent window become lean. LEANK_ORDER
 * while a layer was not appended to. */
leank_status leank_cache_commit(leank_cache *cache);

/* Takes the step under way back, as if it had not been planned. Without one it does nothing. */
leank_status leank_cache_cancel(leank_cache *cache);

/* ---- Memory, and sequences on disk ----------------------------------------------------------- */

typedef struct leank_memory {
    /* Tokens of all sequences; one that several share counts for each. */
    uint64_t tokens;
    /* Blocks in use; each spans all layers. */
    uint64_t full_blocks;
    uint64_t lean_blocks;
    /* Bytes of the blocks in use. */
    uint64_t full_bytes;
    uint64_t lean_bytes;
    /* Bytes of block storage held, free blocks included. */
    uint64_t allocated_bytes;
    /* Bytes of a dense cache without padding for the same tokens, shared ones once. The whole-KV
     * ratio is (full_bytes + lean_bytes) / dense_bytes. */
    uint64_t dense_bytes;
} leank_memory;

/* `size`: sizeof *memory. */
leank_status leank_cache_memory(const leank_cache *cache, leank_memory *memory, size_t size);

/* Takes up to `len` bytes, as write(2): answers how many, at least 1, or a negative number when it
 * failed. No exception and no longjmp may leave it. */
typedef ptrdiff_t (*leank_write)(void *user, const void *data, size_t len);

/* Gives up to `len` bytes, as read(2): answers how many, 0 at the end, or a negative number when it
 * failed. Same rules. */
typedef ptrdiff_t (*leank_read)(void *user, void *data, size_t len);

/* Writes a sequence, for any backend of leank to restore. The pieces are large; no need to buffer
 * them. LEANK_IO when `write` failed: what was written then is of no use. Outside of steps only. */
leank_status leank_cache_save(const leank_cache *cache, leank_sequence sequence, leank_write write,
                              void *user);

/* A new sequence from what leank_cache_save wrote; takes no byte beyond it. LEANK_MISMATCH for one
 * of a cache of another shape, mask, windows, block or types, LEANK_FORMAT for one that is damaged
 * or cut short: a stream from a stranger can be tried safely. Outside of steps only. */
leank_status leank_cache_restore(leank_cache *cache, leank_read read, void *user,
                                 leank_sequence *sequence);

/* ---- In C and C++ only: views without gaps --------------------------------------------------- */

static inline leank_view leank_contiguous(const void *data, int32_t dtype, size_t tokens,
                                          size_t heads, size_t head_dim)
{
    leank_view view;
    view.data = data, view.dtype = dtype;
    view.tokens = tokens, view.heads = heads, view.head_dim = head_dim;
    view.token_stride = heads * head_dim, view.head_stride = head_dim;
    return view;
}

static inline leank_view_mut leank_contiguous_mut(void *data, int32_t dtype, size_t tokens,
                                                  size_t heads, size_t head_dim)
{
    leank_view_mut view;
    view.data = data, view.dtype = dtype;
    view.tokens = tokens, view.heads = heads, view.head_dim = head_dim;
    view.token_stride = heads * head_dim, view.head_stride = head_dim;
    return view;
}

#ifdef __cplusplus
}
#endif

#endif
