// crowd serves the control server of Tailscale's own tests to nodes that are each to see so many
// peers. The peers exist in the network map alone: nobody answers for them.
//
// GET /changes?kind=patch&count=100&every=5ms sends each connected node so many changes of the
// map, one at a time, and answers when the last has been handed to the kernel. A "patch" moves one
// peer to another endpoint; a "peer" is one that comes or, the next time, goes.
package main

import (
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	"log"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"go4.org/mem"
	"tailscale.com/net/tsaddr"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

const (
	domain = "crowd.internal"
	owner  = tailcfg.UserID(1)
	// The first of the peers; below are the real nodes.
	firstPeer = tailcfg.NodeID(1000)
)

func main() {
	listen := flag.String("listen", "", "IP:PORT of the control server")
	relay := flag.String("relay", "", "IP:PORT of the relay, which is told to nodes")
	stunPort := flag.Int("stun-port", 3478, "its STUN port")
	authKey := flag.String("auth-key", "", "what nodes must know to join")
	peers := flag.Int("peers", 0, "how many peers each node sees")
	flag.Parse()
	relayAt := netip.MustParseAddrPort(*relay)

	crowd := &crowd{
		peers:   makePeers(*peers),
		streams: map[*stream]struct{}{},
		derpMap: &tailcfg.DERPMap{Regions: map[tailcfg.DERPRegionID]*tailcfg.DERPRegion{1: {
			RegionID:   1,
			RegionCode: "test",
			Nodes: []*tailcfg.DERPNode{{
				Name:     "1a",
				RegionID: 1,
				HostName: relayAt.Addr().String(),
				IPv4:     relayAt.Addr().String(),
				IPv6:     "none",
				DERPPort: int(relayAt.Port()),
				STUNPort: *stunPort,
			}},
		}}},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/changes", crowd.serveChanges)
	mux.Handle("/", &testcontrol.Server{
		ExplicitBaseURL: "http://" + *listen,
		RequireAuthKey:  *authKey,
		DERPMap:         crowd.derpMap,
		AltMapStream:    crowd.serveMap,
	})
	log.Fatal(http.ListenAndServe(*listen, mux))
}

type crowd struct {
	peers   []*tailcfg.Node
	derpMap *tailcfg.DERPMap

	mu      sync.Mutex
	streams map[*stream]struct{}
	nodes   tailcfg.NodeID
}

// stream is the connection of one node. It is done when its context is.
type stream struct {
	ctx     context.Context
	changes chan *tailcfg.MapResponse
}

func (c *crowd) serveMap(ctx context.Context, w testcontrol.MapStreamWriter, req *tailcfg.MapRequest) {
	if !req.Stream {
		w.SendMapMessage(&tailcfg.MapResponse{})
		return
	}
	// Unbuffered: a change that is taken is written next.
	s := &stream{ctx: ctx, changes: make(chan *tailcfg.MapResponse)}
	c.mu.Lock()
	c.nodes++
	myself := c.myself(c.nodes, req)
	c.streams[s] = struct{}{}
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.streams, s)
		c.mu.Unlock()
	}()

	message := c.first(myself)
	for {
		if err := w.SendMapMessage(message); err != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case message = <-s.changes:
		case <-time.After(50 * time.Second):
			message = &tailcfg.MapResponse{KeepAlive: true}
		}
	}
}

func (c *crowd) myself(id tailcfg.NodeID, req *tailcfg.MapRequest) *tailcfg.Node {
	node := describe(id, "myself")
	node.Key, node.DiscoKey = req.NodeKey, req.DiscoKey
	node.KeyExpiry = time.Now().Add(24 * time.Hour)
	return node
}

func (c *crowd) first(myself *tailcfg.Node) *tailcfg.MapResponse {
	return &tailcfg.MapResponse{
		Node:    myself,
		Peers:   c.peers,
		DERPMap: c.derpMap,
		Domain:  domain,
		PacketFilter: []tailcfg.FilterRule{{
			SrcIPs:   []string{"*"},
			DstPorts: []tailcfg.NetPortRange{{IP: "*", Ports: tailcfg.PortRangeAny}},
		}},
		DNSConfig:    &tailcfg.DNSConfig{Proxied: true, Domains: []string{domain}},
		UserProfiles: []tailcfg.UserProfile{{ID: owner, LoginName: "owner@" + domain}},
	}
}

func (c *crowd) serveChanges(w http.ResponseWriter, r *http.Request) {
	count, err := strconv.Atoi(r.FormValue("count"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	every, err := time.ParseDuration(r.FormValue("every"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var change func(int) *tailcfg.MapResponse
	switch kind := r.FormValue("kind"); kind {
	case "patch":
		change = c.patch
	case "peer":
		change = c.comeOrGo
	default:
		http.Error(w, "no kind "+kind, http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	var streams []*stream
	for s := range c.streams {
		streams = append(streams, s)
	}
	c.mu.Unlock()
	if len(streams) == 0 {
		http.Error(w, "no node is connected", http.StatusConflict)
		return
	}

	begin := time.Now()
	for i := range count {
		time.Sleep(time.Until(begin.Add(time.Duration(i) * every)))
		message := change(i)
		for _, s := range streams {
			select {
			case s.changes <- message:
			case <-s.ctx.Done():
				http.Error(w, "a node went away", http.StatusConflict)
				return
			}
		}
	}
}

func (c *crowd) patch(i int) *tailcfg.MapResponse {
	peer := c.peers[i%len(c.peers)]
	return &tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{
		NodeID:    peer.ID,
		Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), uint16(1024+i%60000))},
	}}}
}

func (c *crowd) comeOrGo(i int) *tailcfg.MapResponse {
	id := firstPeer + tailcfg.NodeID(len(c.peers)+i/2)
	if i%2 == 0 {
		return &tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{makePeer(id)}}
	}
	return &tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{id}}
}

func makePeers(count int) []*tailcfg.Node {
	peers := make([]*tailcfg.Node, count)
	for i := range peers {
		peers[i] = makePeer(firstPeer + tailcfg.NodeID(i))
	}
	return peers
}

// makePeer takes random bytes for its public keys: nobody ever talks to it.
func makePeer(id tailcfg.NodeID) *tailcfg.Node {
	peer := describe(id, fmt.Sprintf("peer-%d", id))
	peer.Key = key.NodePublicFromRaw32(random())
	peer.DiscoKey = key.DiscoPublicFromRaw32(random())
	peer.HomeDERP = 1
	online := true
	peer.Online = &online
	peer.Endpoints = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(id)}), 41641)}
	return peer
}

func describe(id tailcfg.NodeID, name string) *tailcfg.Node {
	v4 := netip.AddrFrom4([4]byte{100, 64 + byte(id>>16), byte(id >> 8), byte(id)})
	addresses := []netip.Prefix{
		netip.PrefixFrom(v4, 32),
		netip.PrefixFrom(tsaddr.Tailscale4To6(v4), 128),
	}
	return &tailcfg.Node{
		ID:                id,
		StableID:          tailcfg.StableNodeID(name),
		Name:              name + "." + domain + ".",
		User:              owner,
		Machine:           key.MachinePublicFromRaw32(random()),
		MachineAuthorized: true,
		Addresses:         addresses,
		AllowedIPs:        addresses,
		Hostinfo:          (&tailcfg.Hostinfo{Hostname: name, OS: "linux"}).View(),
		Cap:               tailcfg.CurrentCapabilityVersion,
	}
}

func random() mem.RO {
	bytes := make([]byte, 32)
	rand.Read(bytes) // it cannot fail (crypto/rand)
	return mem.B(bytes)
}
