/* IBID_SANITIZED is 1 in a build under AddressSanitizer or ThreadSanitizer, else 0. Their shadow memory
 * fits into no limit on address space, and they slow everything down. gcc and clang tell differently. */
#ifndef IBID_BASE_SANITIZED_H
#define IBID_BASE_SANITIZED_H

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define IBID_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define IBID_SANITIZED 1
#endif
#endif
#ifndef IBID_SANITIZED
#define IBID_SANITIZED 0
#endif
#endif
