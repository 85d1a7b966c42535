package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
)

// patience is for a node to answer.
const patience = 10 * time.Second

// administered serves what an administrator does, below /admin/, and all else as server does. A node
// is named by its host name, as in ?node=web.
func administered(server *testcontrol.Server) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", server)

	// Of all nodes of that name: a node that has changed its key is there twice.
	change := func(path string, change func(*tailcfg.Node, *http.Request)) {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			nodes := named(server, r)
			for _, node := range nodes {
				change(node, r)
				server.UpdateNode(node)
			}
			if len(nodes) == 0 {
				http.Error(w, "no such node", http.StatusNotFound)
			}
		})
	}
	change("/admin/expire", func(node *tailcfg.Node, _ *http.Request) {
		// The server's own clock stands still, in 2020.
		node.KeyExpiry = time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC)
		node.Expired = true
	})
	change("/admin/rename", func(node *tailcfg.Node, r *http.Request) {
		_, domain, _ := strings.Cut(node.Name, ".")
		node.Name = r.FormValue("name") + "." + domain
	})

	// From then on a node routes these (?routes=, parted by commas) and nothing else.
	mux.HandleFunc("POST /admin/routes", func(w http.ResponseWriter, r *http.Request) {
		var routes []netip.Prefix
		for text := range strings.SplitSeq(r.FormValue("routes"), ",") {
			if text == "" {
				continue
			}
			route, err := netip.ParsePrefix(text)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			routes = append(routes, route)
		}
		for _, node := range named(server, r) {
			server.SetSubnetRoutes(node.Key, routes)
		}
	})

	// Marks a node as one that tailnet lock does not cover.
	mux.HandleFunc("POST /admin/unsigned", func(w http.ResponseWriter, r *http.Request) {
		for _, node := range named(server, r) {
			server.SetUnsignedPeerAPIOnly(node.Key, true)
			server.UpdateNode(node)
		}
	})

	// The next registrations (?count=) are put off by so many seconds (?seconds=).
	var limited atomic.Int64
	var seconds atomic.Value
	server.MaybeRateLimitRegister = func() (bool, string, string) {
		if limited.Add(-1) < 0 {
			return false, "", ""
		}
		return true, seconds.Load().(string), "too many registrations"
	}
	mux.HandleFunc("POST /admin/limit", func(w http.ResponseWriter, r *http.Request) {
		count, err := strconv.ParseInt(r.FormValue("count"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		seconds.Store(r.FormValue("seconds"))
		limited.Store(count)
	})

	// Sends the body, which is a MapResponse, as it is. The node gets no other maps from then on.
	mux.HandleFunc("POST /admin/tell", func(w http.ResponseWriter, r *http.Request) {
		var message tailcfg.MapResponse
		if err := json.NewDecoder(r.Body).Decode(&message); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		for _, node := range named(server, r) {
			if !server.AddRawMapResponse(node.Key, &message) {
				http.Error(w, "the node has no map stream", http.StatusConflict)
			}
		}
	})

	// Returns when the node has answered a ping in all ways that servers ask for.
	pongs := make(chan struct{}, 1)
	mux.HandleFunc("HEAD /admin/pong", func(http.ResponseWriter, *http.Request) { pongs <- struct{}{} })
	mux.HandleFunc("POST /admin/ping", func(w http.ResponseWriter, r *http.Request) {
		for _, node := range named(server, r) {
			ping := &tailcfg.PingRequest{URL: server.BaseURL() + "/admin/pong"}
			if !server.AddPingRequest(node.Key, ping) {
				http.Error(w, "the node has no map stream", http.StatusConflict)
				return
			}
			select {
			case <-pongs:
			case <-time.After(patience):
				http.Error(w, "no answer to the ping", http.StatusGatewayTimeout)
				return
			}
			echo, err := http.NewRequestWithContext(r.Context(), "GET", "/echo", nil)
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			answer, err := server.NodeRoundTripper(node.Key).RoundTrip(echo)
			if err != nil {
				http.Error(w, err.Error(), http.StatusGatewayTimeout)
				return
			}
			fmt.Fprintln(w, answer.StatusCode)
		}
	})
	return mux
}

func named(server *testcontrol.Server, r *http.Request) (nodes []*tailcfg.Node) {
	for _, node := range server.AllNodes() {
		if node.Hostinfo.Valid() && node.Hostinfo.Hostname() == r.FormValue("node") {
			nodes = append(nodes, node)
		}
	}
	return nodes
}
