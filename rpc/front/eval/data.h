/* The files that `ibid eval` reads: BEIR, SQuAD and KTRL+F layouts. Each loader checks its input,
 * names file and line (or question) of what is wrong, and writes the documents as JSON lines that
 * `ibid index` reads, one line a document, its id kept. */
#ifndef IBID_FRONT_EVAL_DATA_H
#define IBID_FRONT_EVAL_DATA_H

#include "kvstore/kvstore.h"
#include "rpc/base/mem.h"

typedef struct ibidi_judged {
    const char *document; /* id */
    double gain;          /* > 0 */
} ibidi_judged;

typedef struct ibidi_question {
    const char *id;
    ibid_str text;
    ibidi_judged *judged; /* the relevant documents; ascending by id */
    size_t n_judged;
    const ibid_str *golds; /* gold answers (SQuAD), gold mentions (KTRL+F) */
    size_t n_golds;
    size_t document; /* in documents: the one it was asked about (SQuAD, KTRL+F) */
} ibidi_question;

typedef struct ibidi_source {
    const char *id;
    ibid_str text;            /* KTRL+F only; otherwise empty */
    const ibid_str *mentions; /* KTRL+F: every gold-linked mention, in the file's order */
    size_t n_mentions;
} ibidi_source;

typedef struct ibidi_set {
    ibid_arena *arena; /* all strings lie here */
    ibidi_question *questions;
    size_t n_questions, room_questions;
    ibidi_source *documents;
    size_t n_documents, room_documents;
    size_t unjudged; /* BEIR: queries without a relevant document, left out of questions */
    size_t missing;  /* BEIR: judged documents that the corpus does not hold */
} ibidi_set;

/* corpus: lines {"_id","title","text"}; queries: lines {"_id","text"}; qrels: a header, then lines
 * query-id TAB corpus-id TAB score. A judged document the corpus lacks counts as never found. */
ibid_err ibidi_set_beir(const char *corpus, const char *queries, const char *qrels,
                        const char *jsonl, ibidi_set *out);
/* Each paragraph one document, named pAAA-PPP by article and place. Answers may be absent
 * (impossible questions of SQuAD 2 are left out). With `groups` > 0 each document's metadata
 * says which groups it is not in ("not3": "1"; its own group is its number modulo groups), so that
 * a filter can leave out a group and keep everything else. */
ibid_err ibidi_set_squad(const char *path, size_t groups, const char *jsonl, ibidi_set *out);
/* Lines {"id", "data": {"target_text", "qa_pairs": [{"question", "target_entities"}],
 * "entity_info":
 * [{"mention", "entity"}]}}. golds: the mentions of the target entities, in the file's order. */
ibid_err ibidi_set_ktrlf(const char *path, const char *jsonl, ibidi_set *out);
/* Keeps n questions, evenly spaced; 0 or more than there are keeps all. */
void ibidi_set_limit(ibidi_set *s, size_t n);
void ibidi_set_fini(ibidi_set *s);
#endif
