// The store's inner loops: copies between an engine's KV tensors and the arena's slots, checksummed on the way, and reads of the index.
//
// Called through ctypes, so the interpreter's lock is free meanwhile; one call for a batch. Every function has a twin in numpy
// (copies.py) that tests hold to the same results. What is read from shared memory is never trusted: indices are checked before use.
//
// Checksum: XXH3-64, seed 0 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md), for lengths of more than 240 bytes that are multiples of 64.
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { STRIPE = 64, STRIPES_PER_BLOCK = 16, KEY_BYTES = 48, CELLS_PER_BUCKET = 8 };
enum { STATE_GRANTED = 1, STATE_COMMITTED = 2 };
enum { HIT = 0, MISSING = 1, CORRUPT = 2 };

// Mirrors `_NativeArena` in copies.py. The geometry is the caller's own, checked copy, not what shared memory says now.
typedef struct {
  uint8_t *base;
  uint64_t data_offset, slab_bytes;
  uint32_t num_slots, slots_per_slab, num_buckets, reserved;
  uint8_t *state;
  uint32_t *generation;
  uint32_t *last_use_ms, *inserted_ms, *leased_until_ms;
  uint16_t *uses, *owner;
  uint32_t *slab_slot_bytes;
  const uint8_t *records;
  uint64_t *cells;
} arena_t;

typedef struct {
  uint8_t key[KEY_BYTES];
  uint64_t payload_bytes, checksum, position, tenant, record_sum;
  uint8_t reserved[8];
} record_t;

// The engine's side of a copy: `layers` rows per block, row r of block b at pointers[r] + b * strides[r].
typedef struct {
  const uint64_t *pointers, *strides, *row_bytes;
  uint64_t num_layers;
} layout_t;

static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb,
    0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc,
    0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
enum { SCRAMBLE_SECRET = 192 - STRIPE, LAST_SECRET = 192 - STRIPE - 7, MERGE_SECRET = 11 };

static const uint64_t P32_1 = 0x9E3779B1U, P64_1 = 0x9E3779B185EBCA87ULL;
static const uint64_t START[8] = {0xC2B2AE3DU,           0x9E3779B185EBCA87ULL, 0xC2B2AE3D27D4EB4FULL, 0x165667B19E3779F9ULL,
                                  0x85EBCA77C2B2AE63ULL, 0x85EBCA77U,           0x27D4EB2F165667C5ULL, 0x9E3779B1U};

// A checksum under way: `stripe` of `stripes` is the next one.
typedef struct {
  uint64_t lanes[8] __attribute__((aligned(64)));
  uint64_t stripe, stripes;
} sum_t;

static uint64_t read64(const uint8_t *from) {
  uint64_t value;
  memcpy(&value, from, 8);
  return value;
}

static void sum_start(sum_t *sum, uint64_t bytes) {
  memcpy(sum->lanes, START, sizeof START);
  sum->stripe = 0;
  sum->stripes = bytes / STRIPE;
}

static uint64_t sum_end(const sum_t *sum) {
  uint64_t result = sum->stripes * STRIPE * P64_1;
  for (int i = 0; i < 4; i++) {
    const uint8_t *secret = SECRET + MERGE_SECRET + 16 * i;
    unsigned __int128 product = (unsigned __int128)(sum->lanes[2 * i] ^ read64(secret)) * (sum->lanes[2 * i + 1] ^ read64(secret + 8));
    result += (uint64_t)product ^ (uint64_t)(product >> 64);
  }
  result = (result ^ (result >> 37)) * 0x165667919E3779F9ULL;
  return result ^ (result >> 32);
}

static const uint8_t *stripe_secret(const sum_t *sum) {
  return SECRET + (sum->stripe == sum->stripes - 1 ? LAST_SECRET : 8 * (sum->stripe % STRIPES_PER_BLOCK));
}

static int stripe_done(sum_t *sum) {  // whether the lanes are to be scrambled now
  uint64_t done = sum->stripe++;
  return done % STRIPES_PER_BLOCK == STRIPES_PER_BLOCK - 1 && done != sum->stripes - 1;
}

// `next` is where the row after this one begins: its start is fetched while this one's end is copied.
typedef void row_copier(uint8_t *to, const uint8_t *from, uint64_t bytes, const uint8_t *next, sum_t *sum);

static void row_plain(uint8_t *to, const uint8_t *from, uint64_t bytes, const uint8_t *next, sum_t *sum) {
  (void)next;
  memcpy(to, from, bytes);
  if (!sum) return;
  for (uint64_t at = 0; at < bytes; at += STRIPE) {
    const uint8_t *secret = stripe_secret(sum);
    for (int i = 0; i < 8; i++) {
      uint64_t data = read64(to + at + 8 * i), mixed = data ^ read64(secret + 8 * i);
      sum->lanes[i ^ 1] += data;
      sum->lanes[i] += (mixed & 0xFFFFFFFFU) * (mixed >> 32);
    }
    if (stripe_done(sum))
      for (int i = 0; i < 8; i++) {
        uint64_t lane = sum->lanes[i];
        sum->lanes[i] = ((lane ^ (lane >> 47)) ^ read64(SECRET + SCRAMBLE_SECRET + 8 * i)) * P32_1;
      }
  }
}

#if defined(__x86_64__)
// Non-temporal stores: the lines written are not read first, which is worth 1.4 to 1.9 times a memcpy of blocks that are not in a cache.
// AVX-512 was tried: no quicker, and with the checksum half as quick where the compiler laid it out badly.
#define V256 __attribute__((target("avx2"), always_inline)) static inline
V256 __m256i mix256(__m256i lanes, __m256i data, const uint8_t *secret) {
  __m256i mixed = _mm256_xor_si256(data, _mm256_loadu_si256((const void *)secret));
  __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
  return _mm256_add_epi64(product, _mm256_add_epi64(lanes, _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2))));
}
V256 __m256i scramble256(__m256i lanes, const uint8_t *secret) {
  __m256i mixed = _mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47));
  mixed = _mm256_xor_si256(mixed, _mm256_loadu_si256((const void *)secret));
  __m256i prime = _mm256_set1_epi64x((long long)P32_1);
  __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
  return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
}
V256 void stream32(uint8_t *to, __m256i data) { _mm256_stream_si256((void *)to, data); }
V256 void stream16(uint8_t *to, __m256i data) {  // numpy aligns to 16 bytes, torch to 64
  _mm_stream_si128((void *)to, _mm256_castsi256_si128(data));
  _mm_stream_si128((void *)(to + 16), _mm256_extracti128_si256(data, 1));
}
V256 void store(uint8_t *to, __m256i data) { _mm256_storeu_si256((void *)to, data); }

enum { AHEAD = 2048 };  // bytes: of 1,024, 2,048 and 3,072 the best where rows are short, and no worse elsewhere

#define ROW(name, STORE)                                                                                                          \
  __attribute__((target("avx2"))) static void name(uint8_t *to, const uint8_t *from, uint64_t bytes, const uint8_t *next, sum_t *sum) { \
    __m256i low = _mm256_setzero_si256(), high = low;                                                                             \
    if (sum) low = _mm256_load_si256((void *)sum->lanes), high = _mm256_load_si256((void *)(sum->lanes + 4));                     \
    for (uint64_t at = 0; at < bytes; at += STRIPE) {                                                                             \
      const uint8_t *ahead = at + AHEAD < bytes ? from + at + AHEAD : next + (at + AHEAD - bytes);                                \
      __m256i first = _mm256_loadu_si256((const void *)(from + at)), second = _mm256_loadu_si256((const void *)(from + at + 32)); \
      _mm_prefetch((const char *)ahead, _MM_HINT_T0);                                                                             \
      STORE(to + at, first);                                                                                                      \
      STORE(to + at + 32, second);                                                                                                \
      if (!sum) continue;                                                                                                         \
      const uint8_t *secret = stripe_secret(sum);                                                                                 \
      low = mix256(low, first, secret);                                                                                           \
      high = mix256(high, second, secret + 32);                                                                                   \
      if (stripe_done(sum)) {                                                                                                     \
        low = scramble256(low, SECRET + SCRAMBLE_SECRET);                                                                         \
        high = scramble256(high, SECRET + SCRAMBLE_SECRET + 32);                                                                  \
      }                                                                                                                           \
    }                                                                                                                             \
    if (sum) _mm256_store_si256((void *)sum->lanes, low), _mm256_store_si256((void *)(sum->lanes + 4), high);                     \
  }
ROW(row_stream32, stream32)
ROW(row_stream16, stream16)
ROW(row_store, store)
#endif

// Whether vectors may be used: never for `isa` 1, the plain way.
static int has_vectors(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return isa != 1 && __builtin_cpu_supports("avx2");
#else
  return isa < 0;
#endif
}

// The quickest copier for that destination.
static row_copier *fitting(int vectors, const void *to) {
#if defined(__x86_64__)
  if (vectors) return (uintptr_t)to % 32 == 0 ? row_stream32 : (uintptr_t)to % 16 == 0 ? row_stream16 : row_store;
#endif
  (void)vectors, (void)to;
  return row_plain;
}

static void stores_done(void) {
#if defined(__x86_64__)
  _mm_sfence();
#endif
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

int tandem_kv_abi(void) { return 3; }

int tandem_kv_has_vectors(void) { return has_vectors(0); }

void tandem_kv_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Where a slot's bytes start, if its slab has slots of that size now; else NULL.
static uint8_t *slot_start(const arena_t *arena, uint64_t slot, uint64_t slot_bytes, uint64_t payload_bytes) {
  uint64_t slab = slot / arena->slots_per_slab, in_slab = slot % arena->slots_per_slab * slot_bytes;
  if (slot >= arena->num_slots || payload_bytes > slot_bytes || in_slab + payload_bytes > arena->slab_bytes) return 0;
  if (__atomic_load_n(arena->slab_slot_bytes + slab, __ATOMIC_ACQUIRE) != slot_bytes) return 0;
  return arena->base + arena->data_offset + slab * arena->slab_bytes + in_slab;
}

static uint64_t payload_of(const layout_t *layout) {
  uint64_t bytes = 0;
  for (uint64_t layer = 0; layer < layout->num_layers; layer++) bytes += layout->row_bytes[layer];
  return bytes;
}

static uint8_t *row_at(const layout_t *layout, uint64_t layer, int64_t block_id) {
  return (uint8_t *)layout->pointers[layer] + (uint64_t)block_id * layout->strides[layer];
}

// Engine to slots, which are the caller's: block_ids[i] to slots[i], its checksum to sums[i] where `check`. Returns how many were copied:
// it ends where a slot is none of that size.
uint64_t tandem_kv_gather(const arena_t *arena, const int32_t *slots, uint64_t slot_bytes, const layout_t *layout, const int64_t *block_ids,
                          uint64_t n, int check, uint64_t *sums, int isa) {
  int vectors = has_vectors(isa);
  uint64_t payload_bytes = payload_of(layout), i = 0;
  for (; i < n; i++) {
    uint8_t *to = slots[i] < 0 ? 0 : slot_start(arena, (uint64_t)slots[i], slot_bytes, payload_bytes);
    if (!to) break;
    sum_t sum;
    sum_start(&sum, payload_bytes);
    for (uint64_t layer = 0; layer < layout->num_layers; layer++) {
      const uint8_t *row = row_at(layout, layer, block_ids[i]), *next = row;
      if (layer + 1 < layout->num_layers)
        next = row_at(layout, layer + 1, block_ids[i]);
      else if (i + 1 < n)
        next = row_at(layout, 0, block_ids[i + 1]);
      fitting(vectors, to)(to, row, layout->row_bytes[layer], next, check ? &sum : 0);
      to += layout->row_bytes[layer];
    }
    sums[i] = check ? sum_end(&sum) : 0;
  }
  stores_done();
  return i;
}

static void buckets_of(const arena_t *arena, const uint8_t *key, uint32_t *mark, uint64_t *buckets) {
  uint64_t word = read64(key + 16) ^ read64(key);  // the hash's first bytes; the namespace's keep equal hashes of two models apart
  *mark = (uint32_t)(word >> 32) | 1U;
  buckets[0] = (uint32_t)word % arena->num_buckets;
  buckets[1] = (uint32_t)read64(key + 24) % arena->num_buckets;
}

// The committed slot of a key, or -1.
static int64_t find(const arena_t *arena, const uint8_t *key) {
  uint32_t mark;
  uint64_t buckets[2];
  buckets_of(arena, key, &mark, buckets);
  for (int b = 0; b < 2; b++)
    for (int c = 0; c < CELLS_PER_BUCKET; c++) {
      uint64_t cell = __atomic_load_n(arena->cells + buckets[b] * CELLS_PER_BUCKET + c, __ATOMIC_ACQUIRE);
      if ((uint32_t)(cell >> 32) != mark) continue;
      uint32_t slot = (uint32_t)cell;
      if (slot >= arena->num_slots || __atomic_load_n(arena->state + slot, __ATOMIC_ACQUIRE) != STATE_COMMITTED) continue;
      if (memcmp(((const record_t *)arena->records)[slot].key, key, KEY_BYTES) == 0) return slot;
    }
  return -1;
}

// For each of n keys (48 bytes: namespace, hash) its committed slot or -1. A hint: reads check.
void tandem_kv_lookup(const arena_t *arena, const uint8_t *keys, uint64_t n, int32_t *slots) {
  for (uint64_t i = 0; i < n; i++) slots[i] = (int32_t)find(arena, keys + i * KEY_BYTES);
}

// Of a record's fields, for damage that is no attack: each word is mixed in by a multiplication (the finalizer of splitmix64).
static uint64_t record_sum(const record_t *record) {
  uint64_t sum = 0;
  for (int word = 0; word < (KEY_BYTES + 32) / 8; word++) {
    sum = (sum ^ read64((const uint8_t *)record + 8 * word)) * 0xBF58476D1CE4E5B9ULL;
    sum ^= sum >> 31;
  }
  return sum;
}

// Enters slots, whose records are written, into the index. Under the arena's lock. outcomes[i]: 0 done, 1 the key is there already, 2 its
// buckets are full; in the last two cases the slot stays as it was.
void tandem_kv_index(const arena_t *arena, const int32_t *slots, uint64_t n, uint8_t *outcomes) {
  for (uint64_t i = 0; i < n; i++) {
    const uint8_t *key = ((const record_t *)arena->records)[slots[i]].key;
    uint32_t mark;
    uint64_t buckets[2], *best = 0;
    int most_free = 0;
    buckets_of(arena, key, &mark, buckets);
    for (int b = 0; b < 2; b++) {
      uint64_t *cells = arena->cells + buckets[b] * CELLS_PER_BUCKET, *free_cell = 0;
      int free_cells = 0;
      for (int c = 0; c < CELLS_PER_BUCKET; c++)
        if (cells[c] == 0) free_cells++, free_cell = cells + c;
      if (free_cells > most_free) most_free = free_cells, best = free_cell;
    }
    outcomes[i] = find(arena, key) >= 0 ? 1 : best == 0 ? 2 : 0;
    if (outcomes[i]) continue;
    __atomic_store_n(arena->state + slots[i], STATE_COMMITTED, __ATOMIC_RELEASE);
    __atomic_store_n(best, (uint64_t)mark << 32 | (uint32_t)slots[i], __ATOMIC_RELEASE);
  }
}

// Writes the records of filled slots of the caller's and makes them visible, as tandem_kv_index does; outcomes[i] is 3 where a slot is not
// granted to that writer any more.
void tandem_kv_commit(const arena_t *arena, const int32_t *slots, const uint8_t *keys, const uint64_t *sums, uint64_t n,
                      uint64_t payload_bytes, uint64_t first_position, uint64_t tenant, uint16_t writer, uint32_t now_ms, uint8_t *outcomes) {
  for (uint64_t i = 0; i < n; i++) {
    int32_t slot = slots[i];
    outcomes[i] = 3;
    if (__atomic_load_n(arena->state + slot, __ATOMIC_ACQUIRE) != STATE_GRANTED || arena->owner[slot] != writer) continue;
    record_t record = {.payload_bytes = payload_bytes, .checksum = sums[i], .position = first_position + i, .tenant = tenant};
    memcpy(record.key, keys + i * KEY_BYTES, KEY_BYTES);
    record.record_sum = record_sum(&record);
    memcpy((uint8_t *)arena->records + (uint64_t)slot * sizeof record, &record, sizeof record);
    arena->last_use_ms[slot] = arena->inserted_ms[slot] = arena->leased_until_ms[slot] = now_ms;
    arena->uses[slot] = 0;
    tandem_kv_index(arena, slots + i, 1, outcomes + i);
  }
}

// Takes slots out of the index by the keys in their records. Under the arena's lock.
void tandem_kv_remove(const arena_t *arena, const int32_t *slots, uint64_t n) {
  for (uint64_t i = 0; i < n; i++) {
    uint32_t mark;
    uint64_t buckets[2];
    buckets_of(arena, ((const record_t *)arena->records)[slots[i]].key, &mark, buckets);
    for (int b = 0; b < 2; b++)
      for (int c = 0; c < CELLS_PER_BUCKET; c++) {
        uint64_t *cell = arena->cells + buckets[b] * CELLS_PER_BUCKET + c;
        if (*cell && (uint32_t)*cell == (uint32_t)slots[i]) __atomic_store_n(cell, 0, __ATOMIC_RELEASE);
      }
  }
}

// Slots to engine: key i to block_ids[i]. outcomes[i] is HIT, MISSING or CORRUPT (then slots[i] and generations[i] name the slot).
// What is not a HIT may have been written in part. Stops after the first that is not, where `only_leading`; the rest is MISSING.
void tandem_kv_scatter(const arena_t *arena, const uint8_t *keys, const layout_t *layout, const int64_t *block_ids, uint64_t n, int check,
                       int only_leading, uint32_t now_ms, uint8_t *outcomes, int32_t *slots, uint32_t *generations, int isa) {
  int vectors = has_vectors(isa);
  uint64_t payload_bytes = payload_of(layout);
  memset(outcomes, MISSING, n);
  for (uint64_t i = 0; i < n; i++) {
    int64_t slot = slots[i] = (int32_t)find(arena, keys + i * KEY_BYTES);
    if (slot < 0 && only_leading) break;
    if (slot < 0) continue;
    uint32_t generation = generations[i] = __atomic_load_n(arena->generation + slot, __ATOMIC_ACQUIRE);
    uint8_t state = __atomic_load_n(arena->state + slot, __ATOMIC_ACQUIRE);
    record_t record;
    memcpy(&record, (const record_t *)arena->records + slot, sizeof record);
    uint64_t slot_bytes = __atomic_load_n(arena->slab_slot_bytes + slot / arena->slots_per_slab, __ATOMIC_ACQUIRE);
    const uint8_t *from = slot_start(arena, (uint64_t)slot, slot_bytes, payload_bytes);
    int is_good = state == STATE_COMMITTED && memcmp(record.key, keys + i * KEY_BYTES, KEY_BYTES) == 0;
    int fits = record.payload_bytes == payload_bytes && from != 0;
    uint64_t found = 0;
    if (is_good && fits) {
      sum_t sum;
      sum_start(&sum, payload_bytes);
      for (uint64_t layer = 0; layer < layout->num_layers; layer++) {
        uint8_t *row = row_at(layout, layer, block_ids[i]);
        fitting(vectors, row)(row, from, layout->row_bytes[layer], from + layout->row_bytes[layer], check ? &sum : 0);
        from += layout->row_bytes[layer];
      }
      found = sum_end(&sum);
    }
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (!is_good || __atomic_load_n(arena->generation + slot, __ATOMIC_RELAXED) != generation)
      outcomes[i] = MISSING;  // it went while it was being copied
    else if (fits ? check && found != record.checksum : record.record_sum != record_sum(&record))
      outcomes[i] = CORRUPT;
    else if (!fits)
      outcomes[i] = MISSING;  // a good block of another size: the caller is wrong about it
    else {
      outcomes[i] = HIT;
      arena->last_use_ms[slot] = now_ms;  // a plain store: readers may overwrite each other's, and that is fine
    }
    if (outcomes[i] != HIT && only_leading) break;
  }
  stores_done();
}
