// testcontrol serves the control server of Tailscale's own tests, whose tailnet has one relay.
// Everything is in memory, and everyone may reach everyone. The form of POST /routes (node, a host
// name, and any number of route) says what a node routes from then on.
package main

import (
	"flag"
	"fmt"
	"log"
	"net/http"
	"net/netip"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/dnstype"
)

func main() {
	listen := flag.String("listen", "", "IP:PORT of the control server")
	relay := flag.String("relay", "", "IP:PORT of the relay, which is told to nodes")
	stunPort := flag.Int("stun-port", 3478, "its STUN port")
	domain := flag.String("domain", "", "suffix of all names")
	authKey := flag.String("auth-key", "", "what nodes must know to join")
	flag.Parse()
	relayAt := netip.MustParseAddrPort(*relay)

	server := &testcontrol.Server{
		ExplicitBaseURL:  "http://" + *listen,
		RequireAuthKey:   *authKey,
		MagicDNSDomain:   *domain,
		AllNodesSameUser: true,
		AllOnline:        true,
		DNSConfig: &tailcfg.DNSConfig{
			Proxied: true,
			Domains: []string{*domain},
			Routes:  map[string][]*dnstype.Resolver{*domain: nil},
		},
		DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {
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
	http.HandleFunc("POST /routes", func(w http.ResponseWriter, r *http.Request) {
		if err := setRoutes(server, r); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	})
	http.Handle("/", server)
	log.Fatal(http.ListenAndServe(*listen, nil))
}

func setRoutes(server *testcontrol.Server, r *http.Request) error {
	if err := r.ParseForm(); err != nil {
		return err
	}
	var routes []netip.Prefix
	for _, text := range r.PostForm["route"] {
		route, err := netip.ParsePrefix(text)
		if err != nil {
			return err
		}
		routes = append(routes, route)
	}
	for _, node := range server.AllNodes() {
		if node.Hostinfo.Hostname() == r.PostForm.Get("node") {
			server.SetSubnetRoutes(node.Key, routes)
			return nil
		}
	}
	return fmt.Errorf("no node is called %q", r.PostForm.Get("node"))
}
