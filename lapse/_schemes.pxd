"""What a node's workers share for sampling: the scheme, the settings, the distribution (`Sampling`)."""
cimport cython
from libc.stdint cimport int64_t
from lapse._draws cimport distribution_t
from lapse._here cimport here_t
from lapse._node_state cimport NodeState
from lapse._operations cimport worker_t
from lapse._pool cimport pool_t
from lapse._sync cimport pthread_mutex_t

cdef enum Scheme:
    NAIVE
    PRELOC
    POOL
    LOCAL


@cython.final
cdef class Sampling:
    cdef:
        readonly int scheme     # Scheme
        readonly bint with_replacement
        readonly bint postpone
        readonly int64_t group_size
        readonly int64_t reuse
        readonly int64_t batch_size
        readonly object seed
        NodeState protocol
        int pid                 # of the process that made it
        distribution_t d        # owned
        double total            # total_weight
        object function         # FUNCTION: the callable
        readonly size_t longest # bytes of the longest visible value of the range
        readonly bint uniform   # all values of the range are equally long
        dict streams            # {label of a worker: how many Samplers have it}; under the GIL
        int64_t samplers        # that there have been; under the GIL
        pool_t* pool            # owned; POOL
        worker_t* filler        # borrowed from protocol; of the thread that fills the pool, NULL: there is none yet
        public object error     # what the pool's callable raised
        int64_t recent_room     # LOCAL: arrivals after which a look is due
        pthread_mutex_t lock    # guards latest, and refs of all lists
        here_t* latest          # the last list of local keys
    cdef here_t* list_of_now(self, here_t* old) noexcept nogil
    cdef void unlist(self, here_t* l) noexcept nogil
    cdef void let_go(self, here_t* l) noexcept nogil
