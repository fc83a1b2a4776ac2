/* The relocation protocol of docs/protocol.md, for Spin: what nodes, workers and channels do about one key or two.
 *
 * verify/README.md says what stands for what, what is left out, and how to read a trail; verify/check.py runs the configurations.
 * Names are those of docs/architecture.md. One server process per node, worker w on node NODE(w), one FIFO channel per ordered pair of
 * nodes. Every worker does NL localizes, NP pushes and NG pulls in any order; key k has HOME(k), which owns it at first.
 *
 *   K       keys, 1 or 2. With 2 a call names either key or both (PAIRS: always both; PARTS: localizes name key 1)
 *   ASYNC   workers do not wait for pushes and pulls (localizes are never waited for, but at the end; LSYNC: always)
 *   CACHE   location caches: an operation may go to any node first; the cache rule; answers are messages (ANSWERS: those also without)
 *   FINE    the locks of channels are variables, and other threads run between the steps that are taken under them
 *   SEQ     messages have sequence numbers, and a wrong one ends the job
 *   CHAOS   1: one message is lost, 2: doubled, 3: channels change the order
 *   DEATH   one node dies, at any instant; what it had sent may be lost from some message on
 *   B_...   a bug, each of which must be found
 */
#ifndef K
#define K 1
#endif
#ifndef NW
#define NW 2
#endif
#ifndef W0
#define W0 1
#endif
#ifndef W1
#define W1 2
#endif
#ifndef W2
#define W2 0
#endif
#ifndef NL
#define NL 1
#endif
#ifndef NP
#define NP 1
#endif
#ifndef NG
#define NG 1
#endif
#ifndef Q
#define Q 8
#endif
#ifndef HOME1
#define HOME1 1
#endif
#if defined(CACHE) && !defined(ANSWERS)
#define ANSWERS
#endif

#define N 3
#ifdef CACHE
#define FAR 2                                       /* hops */
#else
#define FAR 1
#endif
#define NONE 7
#define HOME(k) ((k) * HOME1)
#define NODE(w) ((w) == 0 -> W0 : ((w) == 1 -> W1 : W2))
#define X(n, k) ((n) * K + (k))                     /* arrays by node, or worker, and key */
#define CH(i, j) ((i) * N + (j))
#define IN(set, k) (((set) >> (k)) & 1)

/* What is one step. Coarse: all that a server does about a message; all that a worker does with one key, or one channel's lock, held. FINE:
 * each look, change or message. Where a worker looks at two keys, or a bug consists of not looking again, there is room in between. */
#ifdef FINE
#define SERVER {
#define GROUP {
#else
#define SERVER atomic {
#define GROUP atomic {
#endif
#if defined(FINE) || K > 1 || defined(B_SPLIT_ROUTE) || defined(B_LATE_MARK)
#define WORKER {
#else
#define WORKER atomic {
#endif

#if defined(DEATH) || defined(SEQ)
#define UP(n) (alive[n] && !failed[n])
#define FAILED(n) failed[n]
#else
#define UP(n) true
#define FAILED(n) false
#endif

#ifdef SEQ
#define NUMBER , byte
#define STAMP(c) , sent[c]
#define STAMPED , number
#define COUNT(c) sent[c] = (sent[c] + 1) % 16;
#else
#define NUMBER
#define STAMP(c)
#define STAMPED
#define COUNT(c)
#endif
#if K == 1
#define MESSAGE mtype, byte, byte, byte, byte NUMBER
#define PUT(c, t, keys, who, a0, b0, a1, b1) net[c]!t, keys, who, a0, b0 STAMP(c)
#define GOT t, keys, who, a[0], b[0] STAMPED
#else
#define MESSAGE mtype, byte, byte, byte, byte, byte, byte NUMBER
#define PUT(c, t, keys, who, a0, b0, a1, b1) net[c]!t, keys, who, a0, b0, a1, b1 STAMP(c)
#define GOT t, keys, who, a[0], b[0], a[1], b[1] STAMPED
#endif

/*              who         a, per key              b, per key
 * LOCALIZE     requester
 * HAND_OVER    requester   new epoch
 * TRANSFER     requester   new epoch               value
 * PUSH, PULL   worker      number of the call      hops
 * DONE         worker                                              (VALUES, ACK)
 * MOVED        requester                                           (only with B_LATE_HOME) */
mtype = { LOCALIZE, HAND_OVER, TRANSFER, PUSH, PULL, DONE, MOVED };
mtype = { AWAY, COMING, HERE };
chan net[N * N] = [Q] of { MESSAGE };
chan queue[N * K] = [Q] of { mtype, byte, byte, bool };     /* what waits for a key: kind, worker, number, routed here by a server */

mtype state[N * K];         /* the slot */
byte epoch[N * K];          /* of the row that is here, or with which it left; of an incoming key: the last one here */
byte value[N * K];          /* a count of pushes */
byte next_owner[N * K], next_epoch[N * K];
byte owner[K], owner_epoch[K];                              /* the homes' directories */
byte open[NW], asked[NW];   /* positions of a worker's pushes and pulls that are not done; of its localizes */
#ifdef CACHE
byte pins[NW * K], route_of[NW * K];                        /* unanswered remote positions, and the way that they went */
#define PINNED(w, k) (pins[X(w, k)] > 0 && route_of[X(w, k)] != HOME(k))
#else
#define PINNED(w, k) false
#endif
#ifdef FINE
bool locked[N * N];
#define LOCK(n, d) atomic { !locked[CH(n, d)] -> locked[CH(n, d)] = true }
#define UNLOCK(n, d) locked[CH(n, d)] = false
#else
#define LOCK(n, d) skip
#define UNLOCK(n, d) skip
#endif
#ifdef SEQ
byte sent[N * N], heard[N * N];
#endif
#if defined(DEATH) || defined(SEQ)
bool alive[N], failed[N];
byte victim = NONE;
#endif
#if defined(CHAOS) && CHAOS < 3
bool once;
#endif

/* Ghosts: what nobody in the protocol knows. */
byte travelling[K];         /* TRANSFERs in flight */
byte truth[K];              /* pushes applied, wherever */
byte issued[NW * K], applied[NW * K];                       /* a worker's calls on a key: issued; the last that was applied */
byte pushes[K];
bool ended[NW];

/* Every check has a name, which an error shows: these are never true. */
hidden byte one_owner, own_order, one_value, room, owner_asks, not_here, second_next, not_coming, bad_epoch, far_way, all_finished,
    nothing_lost, directory_true, nothing_left;
#define CHECK(name, condition) assert((condition) || name)

#define OWNERS(k) ((state[X(0, k)] == HERE) + (state[X(1, k)] == HERE) + (state[X(2, k)] == HERE) + travelling[k])
#ifdef DEATH
#define ONE_OWNER(k) CHECK(one_owner, OWNERS(k) <= 1)
#elif defined(CHAOS) && CHAOS < 3
#define ONE_OWNER(k) skip   /* a lost TRANSFER is no owner, and a doubled one no fault of the protocol: the other checks have to see it */
#else
#define ONE_OWNER(k) CHECK(one_owner, OWNERS(k) == 1)
#endif

inline post(n_, d_, t_, keys_, who_, a0_, b0_, a1_, b1_) {
  CHECK(room, len(net[CH(n_, d_)]) < Q);
  PUT(CH(n_, d_), t_, keys_, who_, a0_, b0_, a1_, b1_);
  COUNT(CH(n_, d_))
}

inline unpin(w_, k_) {
#ifdef CACHE
  if
  :: HOME(k_) != NODE(w_) -> pins[X(w_, k_)]--; if :: pins[X(w_, k_)] == 0 -> route_of[X(w_, k_)] = 0 :: else fi
  :: else
  fi
#else
  skip
#endif
}

/* Apply one position to the row at n: the one place where values change and are read. */
inline apply(n_, k_, t_, w_, s_, routed_) {
  if
  :: t_ == LOCALIZE -> asked[w_]--
  :: else ->
     CHECK(own_order, s_ == applied[X(w_, k_)] + 1);        /* a worker's calls come in its order, each once */
     applied[X(w_, k_)] = s_;
     CHECK(one_value, value[X(n_, k_)] == truth[k_]);       /* it sees all that came before, by anybody */
     if :: t_ == PUSH -> value[X(n_, k_)]++; truth[k_]++ :: else fi;
#ifdef ANSWERS
     if
     :: NODE(w_) != n_ -> post(n_, NODE(w_), DONE, 1 << k_, w_, 0, 0, 0, 0)
     :: else -> open[w_]--; if :: routed_ -> unpin(w_, k_) :: else fi
     fi
#else
     open[w_]--
#endif
  fi
}

/* Router.settle: under the latch. */
inline settle(n_, k_, t_, w_, s_, routed_) {
  if
  :: state[X(n_, k_)] == HERE -> apply(n_, k_, t_, w_, s_, routed_)
  :: else -> CHECK(room, len(queue[X(n_, k_)]) < Q); queue[X(n_, k_)]!t_, w_, s_, routed_
  fi
}

/* Can position k of a call be settled at n? */
#ifdef B_NO_QUEUE
#define SETTLES(n, k, t) (state[X(n, k)] == HERE || (state[X(n, k)] == COMING && t == LOCALIZE))
#else
#define SETTLES(n, k, t) (state[X(n, k)] != AWAY)
#endif

/* Router.destination: where to, if the key is not here. */
inline destination(n_, w_, t_, k_, guesses_, d_) {
  if
  :: HOME(k_) == n_ -> d_ = owner[k_]
#ifdef CACHE
  :: HOME(k_) != n_ && t_ != LOCALIZE && (guesses_) ->
#ifndef B_NO_CACHE_RULE
     if
     :: pins[X(w_, k_)] > 0 -> d_ = route_of[X(w_, k_)]
     :: else ->
#endif
        if :: n_ != 0 -> d_ = 0 :: n_ != 1 -> d_ = 1 :: n_ != 2 -> d_ = 2 fi
#ifndef B_NO_CACHE_RULE
     fi
#endif
  :: HOME(k_) != n_ && !(t_ != LOCALIZE && (guesses_)) -> d_ = HOME(k_)
#else
  :: else -> d_ = HOME(k_)
#endif
  fi
}

#ifdef B_NO_CACHE_RULE
#define HELD(w, k, own, t) false
#else
#define HELD(w, k, own, t) (own && t != LOCALIZE && PINNED(w, k))
#endif

/* Router.route: apply, queue or send the positions `todo` of a call. own: it is a call of this node's worker w. s[] has the call's numbers. */
inline route(n_, w_, t_, own_, hops_) {
  do
  :: todo == 0 -> break
  :: else ->
     for (k : 0 .. K - 1) {
        atomic {
           if
           :: IN(todo, k) ->
              destination(n_, w_, t_, k, own_, dest[k]);
              if
              :: SETTLES(n_, k, t_) && !HELD(w_, k, own_, t_) ->
                 settle(n_, k, t_, w_, s[k], !own_); todo = todo & ~(1 << k); dest[k] = NONE
              :: else -> if :: dest[k] == n_ -> dest[k] = NONE :: else fi          /* it left in this instant: look again */
              fi
           :: else
           fi
        }
     };
     for (d : 0 .. N - 1) {
        if
        :: dest[0] == d || dest[K - 1] == d ->
           GROUP
           LOCK(n_, d);
           for (k : 0 .. K - 1) {
              if :: dest[k] == d -> recheck(n_, w_, t_, own_) :: else fi
           };
           atomic {
              if
              :: go == 0
              :: go != 0 && t_ != LOCALIZE -> post(n_, d, t_, go, w_, IN(go, 0) * s[0], hops_, IN(go, 1) * s[K - 1], IN(go, 1) * (hops_))
              :: go != 0 && t_ == LOCALIZE -> emit_localize(n_)
              fi;
              go = 0; out[0] = 0; out[K - 1] = 0
           };
           UNLOCK(n_, d);
           }
#ifdef B_LATE_MARK
           ;
           atomic {
              for (k : 0 .. K - 1) {
                 if
                 :: t_ == LOCALIZE && IN(late, k) ->
                    if :: state[X(n_, k)] == AWAY -> mark(n_, w_, k) :: else -> settle(n_, k, t_, w_, 0, false) fi
                 :: else
                 fi
              };
              late = 0
           }
#endif
        :: else
        fi
     };
     atomic { k = 0; d = 0; dest[0] = NONE; dest[K - 1] = NONE }
  od
}

inline mark(n_, w_, k_) { state[X(n_, k_)] = COMING; queue[X(n_, k_)]!LOCALIZE, w_, 0, false }

/* Router.recheck: under the lock of the channel to d. Leaves position k in todo for another route, or takes it out. */
inline recheck(n_, w_, t_, own_) {
  atomic {
     if
#ifdef CACHE
#ifndef B_NO_CACHE_RULE
     :: own_ && t_ != LOCALIZE && HOME(k) != n_ && pins[X(w_, k)] > 0 && route_of[X(w_, k)] != d -> dest[k] = NONE
     :: own_ && t_ != LOCALIZE && HOME(k) != n_ && route_of[X(w_, k)] == d && PINNED(w_, k) -> send_it(w_, n_, own_)
#endif
#endif
#if defined(B_SPLIT_ROUTE)
     :: t_ != LOCALIZE -> send_it(w_, n_, own_)
#elif defined(B_CHECK_FIRST)
     :: t_ != LOCALIZE && go != 0 && K > 1 && !(HELD(w_, k, own_, t_)) -> send_it(w_, n_, own_)
#endif
     :: else ->
        if
        :: SETTLES(n_, k, t_) -> settle(n_, k, t_, w_, s[k], !own_); todo = todo & ~(1 << k)
        :: !SETTLES(n_, k, t_) && HOME(k) == n_ && owner[k] != d -> dest[k] = NONE
        :: else ->
           if
           :: t_ != LOCALIZE -> send_it(w_, n_, own_)
           :: else ->
              go = go | (1 << k); todo = todo & ~(1 << k);
#ifdef B_LATE_MARK
              late = late | (1 << k);
#else
              mark(n_, w_, k);
#endif
              if :: HOME(k) == n_ -> out[k] = owner_epoch[k] + 1 :: else fi
           fi
        fi
     fi
  };
  /* Between the mark and this, operations of this node join the queue, and those of others wait in the channels. */
  atomic { if :: t_ == LOCALIZE && IN(go, k) && HOME(k) == n_ -> owner[k] = n_; owner_epoch[k] = out[k] :: else fi }
}

inline send_it(w_, n_, own_) {
  go = go | (1 << k); todo = todo & ~(1 << k);
#ifdef CACHE
  if :: own_ && HOME(k) != n_ -> pins[X(w_, k)]++; route_of[X(w_, k)] = d :: else fi
#endif
}

/* A worker's localize: to the home as LOCALIZE; of keys homed here, to their owner as HAND_OVER. */
inline emit_localize(n_) {
#ifdef B_STALE_EPOCH
  for (k : 0 .. K - 1) { if :: IN(go, k) && HOME(k) == n_ -> out[k] = owner_epoch[k] :: else fi };
#endif
  if :: IN(go, 0) && HOME(0) != n_ -> go2 = 1 :: else -> go2 = 0 fi;
#if K > 1
  if :: IN(go, 1) && HOME(1) != n_ -> go2 = go2 | 2 :: else fi;
#endif
  if :: go2 != 0 -> post(n_, d, LOCALIZE, go2, n_, 0, 0, 0, 0) :: else fi;
  go = go & ~go2;
  if :: go != 0 -> post(n_, d, HAND_OVER, go, n_, IN(go, 0) * out[0], 0, IN(go, 1) * out[K - 1], 0) :: else fi;
  go2 = 0
}

proctype worker(byte w; byte n) {
  byte l = NL, p = NP, g = NG, todo, go, go2, k, d;
  byte s[K], dest[K], out[K];
  mtype t;
#ifdef B_LATE_MARK
  byte late;
#endif
  d_step { dest[0] = NONE; dest[K - 1] = NONE };
  do
  :: FAILED(n) -> break                             /* the call raises NodeFailure */
  :: UP(n) && l + p + g > 0 ->
     WORKER
     atomic {
        if
        :: l > 0 -> l--; t = LOCALIZE
        :: p > 0 -> p--; t = PUSH
        :: g > 0 -> g--; t = PULL
        fi;
#if K == 1
        todo = 1;
#elif defined(PAIRS)
        todo = 3;
#elif defined(PARTS)
        if :: t == LOCALIZE -> todo = 2 :: else -> todo = 3 fi;
#else
        if :: todo = 1 :: todo = 2 :: todo = 3 fi;
#endif
        for (k : 0 .. K - 1) {
           if
           :: IN(todo, k) ->
              if
              :: t != LOCALIZE -> open[w]++; issued[X(w, k)]++; s[k] = issued[X(w, k)]; if :: t == PUSH -> pushes[k]++ :: else fi
              :: else -> asked[w]++; s[k] = 0
              fi
           :: else -> s[k] = 0
           fi
        };
        k = 0
     };
     route(n, w, t, true, 0);
     }
#ifndef ASYNC
     if :: open[w] == 0 :: FAILED(n) fi;
#endif
#ifdef LSYNC
     if :: asked[w] == 0 :: FAILED(n) fi;
#endif
     atomic { t = 0; s[0] = 0; s[K - 1] = 0 }
  :: l + p + g == 0 -> if :: open[w] + asked[w] == 0 :: FAILED(n) fi; break
  od;
  ended[w] = true
}

/* Protocol.note_next: the key is on its way here, and goes on. */
inline note_next(n_, k_, to_, epoch_) {
#ifndef B_NO_NEXT
  CHECK(second_next, next_owner[X(n_, k_)] == NONE);
  next_owner[X(n_, k_)] = to_; next_epoch[X(n_, k_)] = epoch_;
#endif
#ifdef B_DROP_QUEUE
  do :: queue[X(n_, k_)]?qt, qw, qs, qr :: empty(queue[X(n_, k_)]) -> break od;
#endif
  skip
}

/* Protocol.send_transfer: the keys of `go` leave. At their home, which counts epochs, the directory changes under the same lock. */
inline send_transfer(n_, to_, home_) {
  GROUP
  LOCK(n_, to_);
  for (k : 0 .. K - 1) {
     atomic {
        if
        :: IN(go, k) && (home_) -> out[k] = owner_epoch[k] + 1; owner[k] = to_; owner_epoch[k] = out[k]
        :: IN(go, k) && !(home_) -> out[k] = a[k]
        :: else
        fi
     };
     atomic {
        if
        :: IN(go, k) ->
           CHECK(not_here, state[X(n_, k)] == HERE);
           CHECK(bad_epoch, epoch[X(n_, k)] + 1 == out[k]);
           state[X(n_, k)] = AWAY; epoch[X(n_, k)] = out[k]; gone[k] = value[X(n_, k)]; value[X(n_, k)] = 0; travelling[k]++
        :: else
        fi
     }
  };
  atomic {
     post(n_, to_, TRANSFER, go, to_, IN(go, 0) * out[0], gone[0], IN(go, 1) * out[K - 1], IN(go, 1) * gone[K - 1]);
     go = 0; out[0] = 0; gone[0] = 0; out[K - 1] = 0; gone[K - 1] = 0
  };
  UNLOCK(n_, to_);
  }
}

/* Protocol.handle_localize, at the home. */
inline handle_localize(n_) {
  todo = keys;
  do
  :: todo == 0 -> break
  :: else ->
     for (k : 0 .. K - 1) {
        atomic {
           if
           :: IN(todo, k) ->
              CHECK(owner_asks, owner[k] != who);
              if
              :: owner[k] != n_ -> dest[k] = owner[k]
              :: owner[k] == n_ && state[X(n_, k)] == HERE -> go = go | (1 << k); todo = todo & ~(1 << k)
              :: else -> CHECK(not_here, state[X(n_, k)] == COMING); note_next(n_, k, who, owner_epoch[k] + 1); noted = noted | (1 << k)
              fi
           :: else
           fi
        };
        atomic { if :: IN(noted, k) -> owner[k] = who; owner_epoch[k]++; noted = 0; todo = todo & ~(1 << k) :: else fi }
     };
     if :: go != 0 -> send_transfer(n_, who, true) :: else fi;
     for (d : 0 .. N - 1) {
        if
        :: dest[0] == d || dest[K - 1] == d ->
           GROUP
           LOCK(n_, d);
           for (k : 0 .. K - 1) {
              atomic {
                 if
                 :: dest[k] == d && owner[k] == d ->
                    go = go | (1 << k); todo = todo & ~(1 << k); out[k] = owner_epoch[k] + 1;
#ifndef B_LATE_HOME
                    owner[k] = who; owner_epoch[k] = out[k];
#endif
                    dest[k] = NONE
                 :: dest[k] == d && owner[k] != d -> dest[k] = NONE         /* a worker of this node localized it in the meantime */
                 :: else
                 fi
              }
           };
           atomic {
              if :: go != 0 -> post(n_, d, HAND_OVER, go, who, IN(go, 0) * out[0], 0, IN(go, 1) * out[K - 1], 0) :: else fi;
              go = 0; out[0] = 0; out[K - 1] = 0
           };
           UNLOCK(n_, d);
           }
        :: else
        fi
     }
  od
}

/* Protocol.handle_hand_over, at the previous owner. */
inline handle_hand_over(n_) {
  atomic {
     for (k : 0 .. K - 1) {
        if
        :: IN(keys, k) ->
           CHECK(not_here, state[X(n_, k)] != AWAY);
           if :: state[X(n_, k)] == HERE -> go = go | (1 << k) :: else -> note_next(n_, k, who, a[k]) fi
        :: else
        fi
     }
  };
  if :: go != 0 -> send_transfer(n_, who, false) :: else fi;
#ifdef B_LATE_HOME
  atomic { if :: n_ != HOME(0) -> post(n_, HOME(0), MOVED, keys, who, a[0], 0, a[K - 1], 0) :: else fi }
#endif
}

/* Protocol.apply_queue */
inline apply_queue(n_, k_) {
  do
  :: queue[X(n_, k_)]?qt, qw, qs, qr -> apply(n_, k_, qt, qw, qs, qr)
  :: empty(queue[X(n_, k_)]) -> break
  od;
  qt = 0; qw = 0; qs = 0; qr = 0
}

/* Protocol.handle_transfer, arrive and pass_on (key by key) at the requester. */
inline handle_transfer(n_) {
  atomic {
     for (k : 0 .. K - 1) {
        if
        :: IN(keys, k) ->
           travelling[k]--;
           CHECK(not_coming, state[X(n_, k)] == COMING);
           CHECK(bad_epoch, a[k] > epoch[X(n_, k)]);
           CHECK(bad_epoch, next_owner[X(n_, k)] == NONE || next_epoch[X(n_, k)] == a[k] + 1);
           CHECK(bad_epoch, next_owner[X(n_, k)] != NONE || HOME(k) != n_ || owner_epoch[k] == a[k]);
           travelling[k]++                          /* until it is put down, below */
        :: else
        fi
     }
  };
  for (k : 0 .. K - 1) {
     if
     :: IN(keys, k) && next_owner[X(n_, k)] == NONE ->
        atomic {
           travelling[k]--; value[X(n_, k)] = b[k]; epoch[X(n_, k)] = a[k]; state[X(n_, k)] = HERE;
#ifndef B_VISIBLE_EARLY
           apply_queue(n_, k)
#endif
        }
#ifdef B_VISIBLE_EARLY
        ;
        atomic { apply_queue(n_, k) }
#endif
     :: IN(keys, k) && next_owner[X(n_, k)] != NONE ->
        GROUP
        LOCK(n_, next_owner[X(n_, k)]);
        atomic {
           value[X(n_, k)] = b[k]; apply_queue(n_, k); gone[k] = value[X(n_, k)]; value[X(n_, k)] = 0;
           d = next_owner[X(n_, k)]; out[k] = next_epoch[X(n_, k)];
           next_owner[X(n_, k)] = NONE; next_epoch[X(n_, k)] = 0; state[X(n_, k)] = AWAY; epoch[X(n_, k)] = out[k]
        };
        atomic {
           post(n_, d, TRANSFER, 1 << k, d, (k == 0) * out[0], (k == 0) * gone[0], (k == 1) * out[K - 1], (k == 1) * gone[K - 1]);
           out[k] = 0; gone[k] = 0
        };
        UNLOCK(n_, d);
        }
     :: else
     fi
  }
}

/* Protocol.handle: one message after the other. */
proctype server(byte n) {
  mtype t, qt;
  byte keys, who, todo, go, go2, noted, k, d, qw, qs;
  byte a[K], b[K], s[K], dest[K], out[K], gone[K];
  bool qr;
#ifdef B_LATE_MARK
  byte late;
#endif
#ifdef SEQ
  byte number, from;
#endif
  d_step { dest[0] = NONE; dest[K - 1] = NONE };
end:
  do
  :: UP(n) ->
     SERVER
#ifdef SEQ
     atomic {
        if
        :: UP(n) && len(net[CH(0, n)]) > 0 -> net[CH(0, n)]?GOT; from = CH(0, n)
        :: UP(n) && len(net[CH(1, n)]) > 0 -> net[CH(1, n)]?GOT; from = CH(1, n)
        :: UP(n) && len(net[CH(2, n)]) > 0 -> net[CH(2, n)]?GOT; from = CH(2, n)
        fi;
        if
        :: number == heard[from] -> heard[from] = (heard[from] + 1) % 16
        :: else -> failed[0] = true; failed[1] = true; failed[2] = true; keys = 0; t = 0        /* the job ends, on every node */
        fi;
        number = 0; from = 0
     };
#elif defined(DEATH)
     atomic {
        if
        :: UP(n) && len(net[CH(0, n)]) > 0 -> net[CH(0, n)]?GOT
        :: UP(n) && len(net[CH(1, n)]) > 0 -> net[CH(1, n)]?GOT
        :: UP(n) && len(net[CH(2, n)]) > 0 -> net[CH(2, n)]?GOT
        fi
     };
#else
     atomic { if :: net[CH(0, n)]?GOT :: net[CH(1, n)]?GOT :: net[CH(2, n)]?GOT fi };
#endif
     if
     :: t == LOCALIZE -> handle_localize(n)
     :: t == HAND_OVER -> handle_hand_over(n)
     :: t == TRANSFER -> handle_transfer(n)
     :: t == PUSH || t == PULL ->
        atomic {
           CHECK(far_way, b[0] <= FAR && b[K - 1] <= FAR);
           todo = keys; s[0] = a[0]; s[K - 1] = a[K - 1]; qs = (IN(keys, 0) -> b[0] : b[K - 1]) + 1
        };
        route(n, who, t, false, qs)
#ifdef ANSWERS
     :: t == DONE -> atomic { open[who]--; for (k : 0 .. K - 1) { if :: IN(keys, k) -> unpin(who, k) :: else fi } }
#endif
#ifdef B_LATE_HOME
     :: t == MOVED -> atomic { owner[0] = who; owner_epoch[0] = a[0] }
#endif
#ifdef SEQ
     :: t == 0
#endif
     fi;
     atomic {
        ONE_OWNER(0); ONE_OWNER(K - 1);
        t = 0; keys = 0; who = 0; k = 0; d = 0; qs = 0; a[0] = 0; b[0] = 0; s[0] = 0; a[K - 1] = 0; b[K - 1] = 0; s[K - 1] = 0
     }
     }
  od
}

#define CLEAR t = 0; keys = 0; who = 0; a[0] = 0; b[0] = 0
#ifdef CHAOS
#if CHAOS == 1
#define TROUBLE(c) :: atomic { !once && len(net[c]) > 0 -> once = true; net[c]?GOT; CLEAR }
#elif CHAOS == 2
#define TROUBLE(c) :: atomic { !once && len(net[c]) > 0 -> once = true; net[c]?GOT; net[c]!GOT; net[c]!GOT; CLEAR }
#else
#define TROUBLE(c) :: atomic { len(net[c]) > 1 -> net[c]?GOT; net[c]!GOT; CLEAR }
#endif
proctype chaos() {
  mtype t;
  byte keys, who, a[1], b[1];
#ifdef SEQ
  byte number;
#endif
end:
  do
  TROUBLE(0) TROUBLE(1) TROUBLE(2) TROUBLE(3) TROUBLE(4) TROUBLE(5) TROUBLE(6) TROUBLE(7) TROUBLE(8)
  od
}
#endif

#ifdef DEATH
/* A node dies with all that it has, and the scheduler tells those that live, one by one, in any order. */
proctype death() {
  byte told;
  atomic {
     if :: victim = 0 :: victim = 1 :: victim = 2 fi;
     alive[victim] = false; state[victim] = AWAY; value[victim] = 0
  };
#ifdef B_TAKE_OVER
  atomic {
     if
     :: victim != 0 && owner[0] == victim -> owner[0] = 0; owner_epoch[0]++; state[0] = HERE; epoch[0] = owner_epoch[0]
     :: else
     fi
  };
#endif
#ifdef B_ONE_TOLD
  if :: UP(0) -> failed[0] = true :: UP(1) -> failed[1] = true :: UP(2) -> failed[2] = true fi
#else
  do
  :: UP(0) -> failed[0] = true
  :: UP(1) -> failed[1] = true
  :: UP(2) -> failed[2] = true
  :: !UP(0) && !UP(1) && !UP(2) -> break
  od
#endif
}

/* What a dead node had sent arrives up to some message. */
proctype cut() {
  mtype t;
  byte keys, who, a[1], b[1];
end:
  do
  :: atomic {
        victim != NONE && len(net[CH(victim, 0)]) > 0 ->
        do :: net[CH(victim, 0)]?GOT -> if :: t == TRANSFER -> travelling[0]-- :: else fi :: empty(net[CH(victim, 0)]) -> break od;
        CLEAR }
  :: atomic {
        victim != NONE && len(net[CH(victim, 1)]) > 0 ->
        do :: net[CH(victim, 1)]?GOT -> if :: t == TRANSFER -> travelling[0]-- :: else fi :: empty(net[CH(victim, 1)]) -> break od;
        CLEAR }
  :: atomic {
        victim != NONE && len(net[CH(victim, 2)]) > 0 ->
        do :: net[CH(victim, 2)]?GOT -> if :: t == TRANSFER -> travelling[0]-- :: else fi :: empty(net[CH(victim, 2)]) -> break od;
        CLEAR }
  od
}
#endif

#define AT_REST(n, k) (state[X(n, k)] != COMING && next_owner[X(n, k)] == NONE && len(queue[X(n, k)]) == 0)

init {
  byte i;
  atomic {
     for (i : 0 .. K - 1) { state[X(HOME(i), i)] = HERE; owner[i] = HOME(i) };
     for (i : 0 .. N * K - 1) { if :: state[i] == 0 -> state[i] = AWAY :: else fi; next_owner[i] = NONE };
#if defined(DEATH) || defined(SEQ)
     for (i : 0 .. N - 1) { alive[i] = true };
#endif
     for (i : 0 .. N - 1) { run server(i) };
     for (i : 0 .. NW - 1) { run worker(i, NODE(i)) };
#ifdef CHAOS
     run chaos();
#endif
#ifdef DEATH
     run death();
     run cut();
#endif
     i = 0
  };
  timeout ->                                        /* nobody can go on */
  atomic {
#ifdef DEATH
     for (i : 0 .. NW - 1) { CHECK(all_finished, ended[i] || !alive[NODE(i)]) };
#else
#ifdef SEQ
     if
     :: failed[0] -> goto done                      /* noticed; what had been applied until then was right */
     :: else
     fi;
     for (i : 0 .. N * N - 1) { if :: sent[i] != heard[i] -> goto done :: else fi };      /* the last message: a MARK will show it */
#endif
     for (i : 0 .. NW - 1) { CHECK(all_finished, ended[i]) };
     for (i : 0 .. K - 1) {
        CHECK(one_owner, OWNERS(i) == 1 && travelling[i] == 0);
        CHECK(directory_true, state[X(owner[i], i)] == HERE && epoch[X(owner[i], i)] == owner_epoch[i]);
        CHECK(nothing_lost, truth[i] == pushes[i] && value[X(owner[i], i)] == pushes[i]);
        CHECK(nothing_left, AT_REST(0, i) && AT_REST(1, i) && AT_REST(2, i))
     };
#endif
     skip
  };
done:
  skip
}
