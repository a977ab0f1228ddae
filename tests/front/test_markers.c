#include "rpc/front/markers.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static ibid_str str(const char *s) {
    return (ibid_str){s, strlen(s)};
}

static void test_places(void **state) {
    (void)state;
    const char *answer = "The tower is 31 metres tall. Its builder was Maren Tolliver! Ünïcode ends here ";
    ibid_str quotes[] = {str("built by MAREN TOLLIVER in 1871"), str("The tower rises 31 metres"),
                         str("nothing alike"), str("ünïcode")};
    size_t places[4];
    ibidi_marker_places(str(answer), quotes, 4, places);
    assert_int_equal(places[0], strchr(answer, '!') + 1 - answer);
    assert_int_equal(places[1], strchr(answer, '.') + 1 - answer);
    assert_int_equal(places[2], strlen(answer) - 1); /* no word shared: the end, before the space */
    for (size_t i = 0; i < 4; i++) {
        assert_true(places[i] <= strlen(answer));
        assert_true((answer[places[i]] & 0xC0) != 0x80);
    }
}

static void test_empty(void **state) {
    (void)state;
    ibid_str quote = str("quote");
    size_t place = 7;
    ibidi_marker_places(str(""), &quote, 1, &place);
    assert_int_equal(place, 0);
    ibidi_marker_places(str(" \n"), &quote, 1, &place);
    assert_int_equal(place, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_places), cmocka_unit_test(test_empty)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
