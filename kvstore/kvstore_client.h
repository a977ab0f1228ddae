/* The write half of kvstore.h for other processes: same structs, sent to ibid-kvstore over the bus.
 * Each call is one request; errors are those of the store plus UNAVAIL, TIMEOUT, PROTO. Large block
 * batches are split by the caller (IBID_BLOCKS_PUT_MAX bytes of values a call). */
#ifndef IBID_KVSTORE_CLIENT_H
#define IBID_KVSTORE_CLIENT_H

#include "kvstore/kvstore.h"
#include "rpc/bus/bus.h"

enum { IBID_BLOCKS_PUT_MAX = 32 * 1024 * 1024 };

ibid_err ibid_kvc_collection_create(ibid_client *c, ibid_str name, const ibid_hash *model);
ibid_err ibid_kvc_collection_drop(ibid_client *c, ibid_str name);
ibid_err ibid_kvc_model_put(ibid_client *c, const ibid_model_record *m);
ibid_err ibid_kvc_prefix_put(ibid_client *c, const ibid_hash *prefix, size_t n_layers,
                             const void *const *values, size_t value_size);
ibid_err ibid_kvc_blocks_put(ibid_client *c, const ibid_block_put *b, size_t n, uint64_t *numbers);
ibid_err ibid_kvc_blocks_hold(ibid_client *c, uint64_t job, const uint64_t *blocks, size_t n);
ibid_err ibid_kvc_keys_put(ibid_client *c, const ibid_hash *calibration, uint64_t block,
                           const int8_t *keys, size_t n_tokens, size_t dim);
ibid_err ibid_kvc_document_put(ibid_client *c, const ibid_document_put *d, uint64_t *number,
                               uint64_t *generation);
ibid_err ibid_kvc_document_delete(ibid_client *c, ibid_str collection, ibid_str id,
                                  uint64_t *generation);
ibid_err ibid_kvc_job_put(ibid_client *c, const ibid_job *j, uint64_t *id);
ibid_err ibid_kvc_job_delete(ibid_client *c, uint64_t id);
ibid_err ibid_kvc_touch(ibid_client *c, const uint64_t *blocks, size_t n);
ibid_err ibid_kvc_collect(ibid_client *c, ibid_collected *out);
ibid_err ibid_kvc_set_budget(ibid_client *c, uint64_t kv_budget);
/* faults: one sentence a line into out (at most its cap), *n_faults counts all. */
ibid_err ibid_kvc_verify(ibid_client *c, ibid_buf *out, uint64_t *n_faults);
#endif
