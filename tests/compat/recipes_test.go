package compat

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	recipe "go.etcd.io/etcd/client/v3/experimental/recipes"
)

// sessions opens lease-backed sessions of one client, which end with the case.
func (s *session) sessions(count int) []*concurrency.Session {
	client := s.client()
	var opened []*concurrency.Session
	for i := range count {
		lock, err := concurrency.NewSession(client, concurrency.WithTTL(60))
		if err != nil {
			s.note("session %d -> %s", i, failure(err))
			return nil
		}
		opened = append(opened, lock)
	}
	return opened
}

func mutexes(s *session) {
	holders := s.sessions(2)
	if holders == nil {
		return
	}
	first := concurrency.NewMutex(holders[0], "lock")
	second := concurrency.NewMutex(holders[1], "lock")
	s.check("lock", first.Lock(s.ctx))
	s.note("header %s", s.revision(first.Header().Revision))
	err := second.TryLock(s.ctx)
	s.note("try -> locked %v", errors.Is(err, concurrency.ErrLocked))
	waiting := make(chan error)
	go func() { waiting <- second.Lock(s.ctx) }()
	owns, err := s.client().Txn(s.ctx).If(first.IsOwner()).Commit()
	s.note("owner %v %v", owns.Succeeded, err)
	s.check("unlock", first.Unlock(s.ctx))
	s.check("lock by the other", <-waiting)
	owns, err = s.client().Txn(s.ctx).If(first.IsOwner()).Commit()
	s.note("still owner %v %v", owns.Succeeded, err)
	s.check("unlock again", first.Unlock(s.ctx))
	s.check("unlock by the other", second.Unlock(s.ctx))
	s.check("try free", first.TryLock(s.ctx))
}

// mutexOfLostSession revokes the holder's lease, which is how a lock outlives a crashed client.
func mutexOfLostSession(s *session) {
	holders := s.sessions(2)
	if holders == nil {
		return
	}
	first := concurrency.NewMutex(holders[0], "lock")
	second := concurrency.NewMutex(holders[1], "lock")
	s.check("lock", first.Lock(s.ctx))
	waiting := make(chan error)
	go func() { waiting <- second.Lock(s.ctx) }()
	s.check("end of the session", holders[0].Close())
	s.check("lock by the other", <-waiting)
	<-holders[0].Done()
	s.note("the session is over")
}

func mutexContention(s *session) {
	const lockers, rounds = 8, 5
	holders := s.sessions(lockers)
	if holders == nil {
		return
	}
	client, held, counter := s.client(), 0, 0
	var all sync.WaitGroup
	for _, holder := range holders {
		all.Go(func() {
			mutex := concurrency.NewMutex(holder, "lock")
			for range rounds {
				if err := mutex.Lock(s.ctx); err != nil {
					return
				}
				held++
				counter += held
				if _, err := client.Put(s.ctx, "counter", strconv.Itoa(counter)); err != nil {
					return
				}
				held--
				if err := mutex.Unlock(s.ctx); err != nil {
					return
				}
			}
		})
	}
	all.Wait()
	found, err := client.Get(s.ctx, "counter")
	s.note("locked %d times one at a time, stored %s %v", counter, found.Kvs[0].Value, err)
	rest, err := client.Get(s.ctx, "lock", clientv3.WithPrefix(), clientv3.WithCountOnly())
	s.note("left %d %v", rest.Count, err)
}

func elections(s *session) {
	candidates := s.sessions(2)
	if candidates == nil {
		return
	}
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	first := concurrency.NewElection(candidates[0], "election")
	second := concurrency.NewElection(candidates[1], "election")
	_, err := first.Leader(ctx)
	s.note("leader -> %v", err)
	s.check("campaign", first.Campaign(ctx, "one"))
	observed := second.Observe(ctx)
	s.note("observed %s", (<-observed).Kvs[0].Value)
	waiting := make(chan error)
	go func() { waiting <- second.Campaign(ctx, "two") }()
	s.check("proclaim", first.Proclaim(ctx, "one again"))
	s.note("observed %s", (<-observed).Kvs[0].Value)
	s.check("resign", first.Resign(ctx))
	s.check("campaign of the other", <-waiting)
	s.note("observed %s", (<-observed).Kvs[0].Value)
	leader, err := first.Leader(ctx)
	s.note("leader %s %v", leader.Kvs[0].Value, err)
	s.note("proclaim without leading -> %v", first.Proclaim(ctx, "late"))
}

// transactionalMemory moves money between accounts concurrently; none is lost or made.
func transactionalMemory(s *session) {
	const accounts, movers, moves, balance = 5, 6, 10, 100
	client := s.client()
	account := func(i int) string { return fmt.Sprintf("account/%d", i%accounts) }
	for _, level := range []concurrency.Isolation{concurrency.SerializableSnapshot,
		concurrency.Serializable, concurrency.RepeatableReads} {
		for i := range accounts {
			s.quietly(put(account(i), strconv.Itoa(balance)))
		}
		var all sync.WaitGroup
		failures := make(chan error, movers*moves)
		for mover := range movers {
			all.Go(func() {
				for i := range moves {
					move := func(stm concurrency.STM) error {
						from, to := account(mover+i*i), account(mover+i+1)
						if from == to {
							return nil
						}
						a, _ := strconv.Atoi(stm.Get(from))
						b, _ := strconv.Atoi(stm.Get(to))
						stm.Put(from, strconv.Itoa(a-1))
						stm.Put(to, strconv.Itoa(b+1))
						return nil
					}
					if _, err := concurrency.NewSTM(client, move,
						concurrency.WithIsolation(level)); err != nil {
						failures <- err
					}
				}
			})
		}
		all.Wait()
		found, err := client.Get(s.ctx, "account/", clientv3.WithPrefix())
		sum := 0
		for _, kv := range found.Kvs {
			amount, _ := strconv.Atoi(string(kv.Value))
			s.note("%s has %d", kv.Key, amount)
			sum += amount
		}
		s.note("sum %d, failures %d, %v", sum, len(failures), err)
	}
}

func barriers(s *session) {
	client := s.client()
	barrier := recipe.NewBarrier(client, "barrier")
	s.check("hold", barrier.Hold())
	s.check("hold again", barrier.Hold())
	waiting := make(chan error)
	go func() { waiting <- recipe.NewBarrier(client, "barrier").Wait() }()
	s.check("release", barrier.Release())
	s.check("wait", <-waiting)
	enterers := s.sessions(2)
	if enterers == nil {
		return
	}
	for _, enterer := range enterers {
		go func() { waiting <- recipe.NewDoubleBarrier(enterer, "double", 2).Enter() }()
	}
	s.check("enter", <-waiting)
	s.check("enter", <-waiting)
}

func queues(s *session) {
	client := s.client()
	queue := recipe.NewQueue(client, "queue")
	ranked := recipe.NewPriorityQueue(client, "ranked")
	for i := range 5 {
		s.check("enqueue", queue.Enqueue(strconv.Itoa(i)))
		s.check("enqueue ranked", ranked.Enqueue(strconv.Itoa(i), uint16((i*3)%5)))
	}
	for range 5 {
		first, err := queue.Dequeue()
		s.note("dequeued %s %v", first, err)
		top, err := ranked.Dequeue()
		s.note("dequeued ranked %s %v", top, err)
	}
	waiting := make(chan string)
	go func() {
		value, err := queue.Dequeue()
		waiting <- fmt.Sprint(value, err)
	}()
	s.check("enqueue", queue.Enqueue("late"))
	s.note("dequeued %s", <-waiting)
}

func readWriteMutexes(s *session) {
	holders := s.sessions(3)
	if holders == nil {
		return
	}
	reader, another := recipe.NewRWMutex(holders[0], "rw"), recipe.NewRWMutex(holders[1], "rw")
	writer := recipe.NewRWMutex(holders[2], "rw")
	s.check("read lock", reader.RLock())
	s.check("read lock", another.RLock())
	waiting := make(chan error)
	go func() { waiting <- writer.Lock() }()
	s.check("read unlock", reader.RUnlock())
	s.check("read unlock", another.RUnlock())
	s.check("write lock", <-waiting)
	s.check("write unlock", writer.Unlock())
}
