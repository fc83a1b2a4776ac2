"""How this copy of Lapse was compiled; setup.py passes the answers as macros."""

cdef extern from *:
    """
    #ifndef LAPSE_DEBUG                    /* a user's own module, not built by our setup.py */
    #define LAPSE_DEBUG 0
    #define LAPSE_BUILD_KIND "unknown"
    #define LAPSE_BUILD_FLAGS "unknown"
    #endif
    #if defined(__clang__)
    #define LAPSE_COMPILER __VERSION__
    #elif defined(__GNUC__)
    #define LAPSE_COMPILER "gcc " __VERSION__
    #else
    #define LAPSE_COMPILER "unknown"
    #endif
    """
    const bint DEBUG "LAPSE_DEBUG"         # a constant: `if DEBUG:` costs nothing in a release build
    const char* BUILD_KIND "LAPSE_BUILD_KIND"
    const char* BUILD_FLAGS "LAPSE_BUILD_FLAGS"
    const char* COMPILER "LAPSE_COMPILER"
