/* Sole includer of FAISS: k-means for the key index's cells. */
#include "retriever/key_index_internal.h"

#include <string.h>

#include <faiss/c_api/Clustering_c.h>
#include <faiss/c_api/IndexFlat_c.h>
#include <faiss/c_api/Index_c.h>
#include <faiss/c_api/error_c.h>

/* libgomp comes with FAISS; the setting is per calling thread. */
extern void omp_set_num_threads(int n) __attribute__((weak));

static ibid_err failed(int rc, const char *what) {
    if (!rc) return IBID_OK;
    const char *said = faiss_get_last_error();
    return ibid_fail(IBID_BACKEND, "FAISS cannot %s: %s", what, said ? said : "no reason given");
}

ibid_err ibidi_cells_train(const float *rows, size_t n, size_t dim, size_t k, size_t rounds,
                           size_t threads, float *centroids) {
    FaissClusteringParameters p;
    FaissClustering *c = NULL;
    FaissIndexFlatIP *index = NULL;
    float *found = NULL;
    size_t size = 0;
    if (omp_set_num_threads) omp_set_num_threads(threads ? (int)threads : 1);
    faiss_ClusteringParameters_init(&p);
    p.niter = (int)rounds;
    p.spherical = 1;
    p.min_points_per_centroid = 1; /* fewer than it likes is no news to the log */
    p.max_points_per_centroid = 1 << 20;
    p.seed = 1234;
    ibid_err e =
        failed(faiss_Clustering_new_with_params(&c, (int)dim, (int)k, &p), "begin clustering");
    if (!e) e = failed(faiss_IndexFlatIP_new_with(&index, (idx_t)dim), "make an index");
    if (!e) e = failed(faiss_Clustering_train(c, (idx_t)n, rows, index), "cluster");
    if (!e) {
        faiss_Clustering_centroids(c, &found, &size);
        if (size != k * dim)
            e = ibid_fail(IBID_INTERNAL, "FAISS made %zu numbers, not %zu", size, k * dim);
    }
    if (!e) memcpy(centroids, found, size * sizeof *centroids);
    if (index) faiss_Index_free(index);
    if (c) faiss_Clustering_free(c);
    return e;
}
