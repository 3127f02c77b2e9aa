package compat

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"math"
	"reflect"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	shownBytesMax = 48
	// revisions beyond this are a case's own huge number, not a place in the store's history
	revisionMax = 1 << 40
)

// A renderer turns protobuf messages into text in which equal behaviour reads equal:
// revisions count from the start of the case, and what a server chooses freely is only "set".
type renderer struct {
	base   int64
	leases map[int64]string // names of leases whose ids the server chose
}

// unlike are fields that have a case of their own instead.
var unlike = map[string]bool{"StatusResponse.DbSizeQuota": true, "Member.PeerURLs": true}

// chosen are the fields of which only presence is promised, by message and field.
var chosen = map[string]bool{
	"ResponseHeader.ClusterId": true, "ResponseHeader.MemberId": true,
	"ResponseHeader.RaftTerm": true, "StatusResponse.DbSize": true,
	"StatusResponse.Version": true, "StatusResponse.Leader": true, "StatusResponse.RaftIndex": true,
	"StatusResponse.RaftTerm": true, "StatusResponse.RaftAppliedIndex": true,
	"StatusResponse.DbSizeInUse": true, "StatusResponse.Errors": true,
	"HashResponse.Hash": true, "HashKVResponse.Hash": true,
	"AlarmRequest.MemberID": true, "AlarmMember.MemberID": true,
	"Member.ID": true, "Member.Name": true, "Member.ClientURLs": true,
}

// message renders a protobuf message on one line, fields in the order of their declaration.
func (r *renderer) message(message any) string {
	value := reflect.ValueOf(message)
	if value.Kind() == reflect.Pointer && value.IsNil() {
		return "nothing"
	}
	if ttl, ok := message.(*etcdserverpb.LeaseTimeToLiveResponse); ok {
		value = reflect.ValueOf(settled(ttl))
	}
	return value.Type().Elem().Name() + r.fields(value.Elem())
}

// settled puts the keys, which come in any order, in order, and lifts the remaining seconds back
// to those granted if only few have passed.
func settled(response *etcdserverpb.LeaseTimeToLiveResponse) *etcdserverpb.LeaseTimeToLiveResponse {
	const elapsedMax = 3
	settled := *response
	if settled.TTL > 0 && settled.GrantedTTL-settled.TTL <= elapsedMax {
		settled.TTL = settled.GrantedTTL
	}
	settled.Keys = slices.SortedFunc(slices.Values(response.Keys), bytes.Compare)
	return &settled
}

func (r *renderer) fields(structure reflect.Value) string {
	kind := structure.Type()
	var parts []string
	for i := range kind.NumField() {
		field, value := kind.Field(i), structure.Field(i)
		if field.Name == "XXX_unrecognized" && value.Len() > 0 {
			parts = append(parts, fmt.Sprintf("unknown:%x", value.Bytes()))
		}
		if !field.IsExported() || strings.HasPrefix(field.Name, "XXX_") || value.IsZero() ||
			unlike[kind.Name()+"."+field.Name] {
			continue
		}
		name, text := field.Name, "set"
		if value.Kind() == reflect.Interface { // a oneof: its wrapper's only field says all
			wrapper := value.Elem().Elem()
			name, value = wrapper.Type().Field(0).Name, wrapper.Field(0)
		}
		if !chosen[kind.Name()+"."+name] {
			text = r.value(name, value)
		}
		parts = append(parts, name+":"+text)
	}
	return "{" + strings.Join(parts, " ") + "}"
}

func (r *renderer) value(name string, value reflect.Value) string {
	switch value.Kind() {
	case reflect.Pointer:
		return r.value(name, value.Elem())
	case reflect.Struct:
		return r.fields(value)
	case reflect.Slice:
		if value.Type().Elem().Kind() == reflect.Uint8 {
			return shortened(value.Bytes())
		}
		parts := make([]string, value.Len())
		for i := range parts {
			parts[i] = r.value(name, value.Index(i))
		}
		return "[" + strings.Join(parts, ", ") + "]"
	case reflect.Int64:
		return r.number(name, value.Int())
	case reflect.String:
		return fmt.Sprintf("%q", value.String())
	default:
		return fmt.Sprint(value.Interface())
	}
}

func (r *renderer) number(name string, number int64) string {
	if strings.HasSuffix(name, "Revision") {
		return r.revision(number)
	}
	if name == "ID" || name == "Lease" {
		return r.lease(number)
	}
	return fmt.Sprint(number)
}

// revision renders a revision as its distance from the start of the case: +1 is the first change.
func (r *renderer) revision(revision int64) string {
	if revision <= 0 || revision > revisionMax {
		return fmt.Sprint(revision)
	}
	return fmt.Sprintf("%+d", revision-r.base)
}

func (r *renderer) lease(id int64) string {
	if name, ok := r.leases[id]; ok {
		return name
	}
	return fmt.Sprint(id)
}

// shortened quotes bytes; of long ones it shows the start, the length and a checksum.
func shortened(data []byte) string {
	if len(data) <= shownBytesMax {
		return fmt.Sprintf("%q", data)
	}
	return fmt.Sprintf("%q...(%d bytes, crc %08x)",
		data[:shownBytesMax/2], len(data), crc32.ChecksumIEEE(data))
}

// largest is the highest number that a revision field holds.
const largest = math.MaxInt64
